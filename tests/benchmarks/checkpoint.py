"""How long training waits for a save: synchronous and asynchronous at the same size, in one run on two ranks.

    PYTHONPATH=. python tests/benchmarks/checkpoint.py --json checkpoint.json     # three minutes, 4 GB of memory
    PYTHONPATH=. python tests/benchmarks/checkpoint.py --dim 256 --repeats 1      # a quick look

A real engine (ZeRO-3, two experts' groups, fp32, AdamW) trains a model of ``--dim``; between its steps it saves in each
of these ways, in turns, ``--repeats`` times each. Reported for each, worst rank, median over the turns:

- *stall*: seconds that the call keeps training waiting;
- *written*: seconds from the call until the bytes are on the disk (for ours: synced, read back, committed);
- *step beside it*: seconds of the training step that follows the call, when the write goes on beside it.

The ways: DeepSpeed's own ``save_checkpoint`` (``torch.save``, nothing synced, hashed or read back); torch's
``distributed.checkpoint.async_save`` of the same tensors (for scale: DeepSpeed cannot load its files); ours,
synchronous and asynchronous. The first saves are reported apart: an asynchronous one then allocates the buffers that
later ones reuse.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANKS = 2
BATCH, LENGTH = 2, 64


def settings(dim: int) -> dict[str, Any]:
    """A run whose state is mostly experts, as in the large variants."""
    return {
        "run": {"seed": 1},
        "model": {
            "vocab_size": 1024,
            "dim": dim,
            "max_seq_len": LENGTH,
            "max_output_tokens": LENGTH,
            "prelude_layers": 1,
            "recurrent_layers": 1,
            "coda_layers": 1,
            "max_loop_iters": 1,
            "n_heads": 8,
            "n_kv_heads": 8,
            "ffn_dim": 2 * dim,
            "n_experts": 16,
            "n_experts_per_tok": 2,
            "expert_dim": dim,
        },
        "data": {"path": "unused", "sequence_length": LENGTH, "global_batch_size": RANKS * BATCH},
        "schedule": {"steps": 10, "warmup_steps": 0},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 3, "expert_parallel_size": 2, "micro_batch_size": BATCH},
    }


def measure(rank: int, port: int, dim: int, repeats: int, folder: Path, answers: Any) -> None:
    """A rank of the benchmark; the first puts the measurements into ``answers``."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        LOCAL_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch
    import torch.distributed.checkpoint as torch_checkpoint

    from launch.environment import discover_place
    from launch.settings import parse_settings
    from pretrain.checkpoint import Checkpointer, Fence, RunIdentity, TrainingState
    from pretrain.config import CheckpointSection, TrainingConfig
    from pretrain.engine import TrainingEngine
    from pretrain.losses import mean_loss

    torch.set_num_threads(1)
    engine = TrainingEngine(parse_settings(TrainingConfig, settings(dim), "benchmark"), discover_place())
    ids = torch.randint(0, 1024, (BATCH, LENGTH), generator=torch.Generator().manual_seed(rank))

    def train_step() -> None:
        engine.backward(mean_loss(engine.forward(ids, 1, targets=ids).losses_BS, ids))
        engine.step(1e-4)
        engine.take_expert_load()

    def checkpointer(asynchronous: bool) -> Checkpointer:
        run = folder / f"asynchronous_{asynchronous}"
        section = CheckpointSection(asynchronous=asynchronous, keep_last=1, plain_weights=False)
        made = Checkpointer(run / "checkpoints", section, RunIdentity({}, {}, {}), engine, Fence(run), print)
        made.resume()
        return made

    synchronous, asynchronous = checkpointer(False), checkpointer(True)
    pending: list[Any] = []

    def save_ours(target: Checkpointer, number: int) -> None:
        target.save(TrainingState(step=number, next_sample=0, tokens=0, wandb_id=None))

    def save_stock(number: int) -> None:
        engine._engine.save_checkpoint(str(folder / "stock"), tag="stock", save_latest=False)

    def save_torch(number: int) -> None:
        state = {f"{rank}/{name}": value for name, value in tensors(engine.snapshot(folder, "t", None)).items()}
        pending.append(torch_checkpoint.async_save(state, checkpoint_id=str(folder / "torch" / str(number))))

    ways: dict[str, tuple[Callable[[int], None], Callable[[], object]]] = {
        "DeepSpeed, synchronous": (save_stock, lambda: None),
        "torch.distributed.checkpoint, asynchronous": (save_torch, lambda: pending.pop().result()),
        "ours, synchronous": (lambda number: save_ours(synchronous, number), synchronous.wait),
        "ours, asynchronous": (lambda number: save_ours(asynchronous, number), asynchronous.wait),
    }
    for _ in range(3):
        train_step()
    (folder / "stock").mkdir(exist_ok=True)
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    alone = []
    for number in range(repeats + 1):
        engine.barrier()
        started = time.perf_counter()
        train_step()
        alone.append(worst(engine, time.perf_counter() - started))
        for way, (save, finish) in ways.items():
            engine.barrier()
            started = time.perf_counter()
            save(number + 1)
            stall = time.perf_counter() - started
            train_step()
            step = time.perf_counter() - started - stall
            finish()
            written = time.perf_counter() - started
            name = f"{way}, first" if number == 0 else way
            for key, seconds in (("stall", stall), ("written", written), ("step_beside_it", step)):
                rows[name][key].append(worst(engine, seconds))
            if rank == 0:
                shutil.rmtree(folder / "torch", ignore_errors=True)
    size = sum(tensor.nbytes for tensor in tensors(engine.snapshot(folder, "t", None)).values())
    if rank == 0:
        answers.put(
            {
                "state_bytes_a_rank": size,
                "ranks": RANKS,
                "repeats": repeats,
                "step_seconds_alone": statistics.median(alone),
                "seconds": {
                    way: {key: statistics.median(values) for key, values in row.items()} for way, row in rows.items()
                },
            }
        )
    engine.close()


def worst(engine: Any, seconds: float) -> float:
    """The slowest rank's time."""
    return float(max(engine.gather_objects(seconds)))


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor in nested containers, by its path."""
    import torch

    if isinstance(value, torch.Tensor):
        return {name: value.detach()}
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    return {path: found for key, child in children for path, found in tensors(child, f"{name}.{key}").items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Stall of synchronous and asynchronous saves at the same size.")
    parser.add_argument("--dim", type=int, default=1024, help="width of the model; 1024 is 0.4 GB of state a rank")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = (port, options.dim, options.repeats, Path(folder), answers)
        processes = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed")
    result = answers.get()
    report(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def report(result: dict[str, Any]) -> None:
    """The table, and the ratio it is about."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    size = result["state_bytes_a_rank"] / 1e6
    table = Table(
        title=f"{size:.0f} MB of state a rank, {RANKS} ranks; a step alone {result['step_seconds_alone']:.3f} s"
    )
    for column in ("way", "stall s", "written s", "step beside it s"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, row in result["seconds"].items():
        table.add_row(way, *(f"{row[key]:.3f}" for key in ("stall", "written", "step_beside_it")))
    console.print(table)
    seconds = result["seconds"]
    ratio = seconds["ours, synchronous"]["stall"] / seconds["ours, asynchronous"]["stall"]
    console.print(f"an asynchronous save keeps training waiting {ratio:.0f} times shorter than a synchronous one")


if __name__ == "__main__":
    main()
