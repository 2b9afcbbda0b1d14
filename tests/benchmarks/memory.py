"""Memory of the loops under every rematerialisation policy, and what each policy costs in time.

    OMP_NUM_THREADS=1 python tests/benchmarks/memory.py --json memory.json

Bytes (exact, no clock): what a forward of T loops keeps for its backward beyond what one of one loop keeps, in loop
states (batch x sequence x width); and the most bytes alive at any time of forward and backward, recomputation and
gradients included, parameters not. "kept" is counted by torch's hooks of saved tensors, "tape" and "host" by
``model/remat`` itself, "peak" by a dispatch mode that sees every storage. On this CPU host copies are ordinary memory,
so the peak contains them.

Price: CPU seconds of a training step at 16 loops beside those of ``none``, the policies run in turn, the fastest of
several. Optimizer not included.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script
sys.path.insert(1, str(Path(__file__).parents[1] / "model"))

from rich.console import Console
from rich.table import Table
from stored_bytes import LiveBytes, stored_bytes

from model import IceConfig, IceModel

DEPTHS = (1, 4, 16, 64)
WAYS: dict[str, tuple[Any, bool]] = {
    "none": ("none", False),
    "loop": ("loop", False),
    "routes": ("routes", False),
    "dispatch (EP=1)": ("dispatch", False),
    "sqrt": ("sqrt", False),
    "loop, offloaded": ("loop", True),
    "sqrt, offloaded": ("sqrt", True),
}
BATCH = 2


def benchmark_model(dim: int, experts: int) -> IceModel:
    """A model whose loop is nearly all of it."""
    torch.manual_seed(0)
    config = IceConfig(
        vocab_size=256,
        dim=dim,
        max_seq_len=1024,
        max_output_tokens=1024,
        prelude_layers=1,
        coda_layers=1,
        n_heads=8,
        n_kv_heads=4,
        ffn_dim=2 * dim,
        n_experts=experts,
        n_experts_per_tok=4,
        expert_dim=dim // 2,
    )
    return IceModel(config)


def measure_bytes(model: IceModel, length: int) -> dict[str, dict[int, dict[str, float]]]:
    """By policy and depth: states kept, on the tape, on the host, and at the peak."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, length))
    state = BATCH * length * model.config.dim * 4
    model(ids, n_loops=1).sum().backward()  # gradients exist before anything is measured
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for way, (policy, offload) in WAYS.items():
        model.set_remat(policy, "block", offload)
        rows[way] = {}
        for depth in DEPTHS:
            kept = stored_bytes(lambda depth=depth: model(ids, n_loops=depth).sum())  # type: ignore[misc]
            gc.collect()
            with LiveBytes() as live:
                loss = model(ids, n_loops=depth).sum()
                between = live.now
                loss.backward()
            del loss
            figures = {"kept": kept.device, "tape": kept.tape, "host": kept.host, "alive": between, "peak": live.most}
            rows[way][depth] = {name: figure / state for name, figure in figures.items()}
    return rows


def measure_price(model: IceModel, length: int, loops: int, rounds: int) -> dict[str, float]:
    """CPU seconds of forward and backward by policy, over those of ``none``."""
    ids = torch.randint(0, model.config.vocab_size, (BATCH, length))
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for way, (policy, offload) in WAYS.items():
            model.set_remat(policy, "none", offload)
            start = time.process_time()
            model(ids, n_loops=loops).square().mean().backward()
            best[way] = min(best[way], time.process_time() - start)
    return {way: seconds / best["none"] for way, seconds in best.items()}


def bars(rows: dict[str, dict[int, dict[str, float]]]) -> dict[str, bool]:
    """The promises, kept or not."""

    def grown(way: str, depth: int, what: str = "kept") -> float:
        return rows[way][depth][what] - rows[way][1][what]

    return {
        "loop: exactly one state a loop, nothing else": all(
            grown("loop", depth) == depth - 1 and rows["loop"][depth]["tape"] == 0 for depth in DEPTHS
        ),
        "sqrt at T=64: at most 0.35 of loop": grown("sqrt", 64) <= 0.35 * grown("loop", 64),
        "sqrt at T=64: peak growth at most 0.35 of loop's": grown("sqrt", 64, "peak")
        <= 0.35 * grown("loop", 64, "peak"),
        "loop, offloaded: no state stays on the device": grown("loop, offloaded", 64) == 0,
    }


def main() -> int:
    """Print the tables; status 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the timing; 0 for none")
    arguments = parser.parse_args()
    console = Console(width=120)
    rows = measure_bytes(benchmark_model(dim=64, experts=8), length=64)
    table = Table(title="in loop states: kept beyond one loop + tape + host | peak of forward and backward")
    table.add_column("policy")
    for depth in DEPTHS:
        table.add_column(f"T={depth}", justify="right")
    for way, by_depth in rows.items():
        table.add_row(
            way,
            *(
                f"{f['kept'] - by_depth[1]['kept']:.2f} + {f['tape']:.2f} + {f['host']:.2f} | {f['peak']:.1f}"
                for f in by_depth.values()
            ),
        )
    console.print(table)
    price: dict[str, float] = {}
    if arguments.rounds:
        price = measure_price(benchmark_model(dim=256, experts=16), length=128, loops=16, rounds=arguments.rounds)
        table = Table(title="CPU time of a step, 16 loops, over that of none")
        for way in price:
            table.add_column(way, justify="right")
        table.add_row(*(f"{ratio:.2f}" for ratio in price.values()))
        console.print(table)
    held = bars(rows)
    for name, passed in held.items():
        console.print(f"{'pass' if passed else 'FAIL'}  {name}", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps({"states": rows, "price": price, "bars": held}, indent=1) + "\n")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
