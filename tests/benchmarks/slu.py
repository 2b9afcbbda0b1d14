"""SLU on a small trained model: what the depth heads save, and how often shallow drafts are accepted.

    python tests/benchmarks/slu.py --steps 1000       # some 8 minutes of one core; prints docs/slu.md's tables

A byte-level model (width 96, one looped block, T = 8) with depth heads learns the prose and verse of the demo's corpus
for ``steps`` steps of random depth. Then, on held-out text: bits a byte at fixed depths and under adaptive depth at
several thresholds; and one prompt continued at full depth and speculatively. Rates are per second of processor time.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from model import IceConfig, IceModel
from model.adaptive_depth import AdaptiveDepth
from model.generation import FULL_DEPTH, Adaptive, Decoding, GenerationOptions, Sampling, Speculative, generate
from pretrain.losses import depth_head_loss

ROOT = Path(__file__).resolve().parents[2]
LOOPS = 8
BENEFIT_MARGIN = 0.01  # nats
CONFIG = IceConfig(
    vocab_size=256,
    dim=96,
    max_seq_len=512,
    max_output_tokens=512,
    prelude_layers=1,
    coda_layers=1,
    max_loop_iters=LOOPS,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=256,
    n_experts=0,
    qk_norm=True,
    sandwich_norm=True,
    slu=True,
)


def corpus_bytes() -> torch.Tensor:
    """Prose and verse of the embedded corpus, uint8."""
    text = b""
    for name in ("austen", "verse"):
        lines = lzma.decompress((ROOT / "data_pipeline" / "corpus" / f"{name}.jsonl.xz").read_bytes()).splitlines()
        text += b"\n".join(json.loads(line)["text"].encode() for line in lines)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(data: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """Random stretches of ``length`` bytes, (count, length) int64."""
    starts = torch.randint(0, len(data) - length, (count,)).tolist()
    return torch.stack([data[start : start + length] for start in starts]).long()


def train(data: torch.Tensor, steps: int) -> IceModel:
    """The model after ``steps`` steps of 12 sequences of 128 bytes at depths from 2 to 10."""
    torch.manual_seed(0)
    random.seed(0)
    model = IceModel(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for step in track(range(steps), description="training"):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * (1 - 0.95 * step / steps)
        ids = windows(data, 12, 129)
        n_loops = random.choice([2, 4, 6, 8, 8, 10])
        output = model(
            ids[:, :-1], n_loops, targets=ids[:, 1:], probe_loop=random.randint(1, n_loops - 1), return_output=True
        )
        loss = output.losses_BS.mean()
        assert output.probe is not None
        optimizer.zero_grad()
        (loss + depth_head_loss(output.probe, ids[:, 1:], BENEFIT_MARGIN)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def depth_table(model: IceModel, ids: torch.Tensor) -> Table:
    """Bits a byte at fixed depths, then at the depths the heads choose."""

    def bits(logits_BSV: torch.Tensor) -> str:
        return f"{F.cross_entropy(logits_BSV.flatten(0, 1), ids[:, 1:].flatten()).item() / math.log(2):.4f}"

    table = Table("depth", "mean loops", "bits a byte")
    for depth in (1, 2, 3, 4, 8):
        table.add_row(f"fixed at {depth}", f"{depth}", bits(model(ids[:, :-1], depth)))
    for threshold in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
        controller = AdaptiveDepth(model.depth_heads, threshold)
        logits_BSV = model(ids[:, :-1], LOOPS, controller=controller)
        table.add_row(f"threshold {threshold}", f"{controller.loops_BS.float().mean():.2f}", bits(logits_BSV))
    return table


def speed_table(model: IceModel, prompt: torch.Tensor, new_tokens: int = 96) -> Table:
    """One prompt continued in every mode; speculation's greedy text is checked against full depth's."""
    modes: dict[str, Decoding] = {"full depth": FULL_DEPTH}
    modes |= {f"{k} drafts of {d} loops": Speculative(k, d) for d in (1, 2, 4) for k in (2, 4)}
    modes |= {"4 drafts, depth by the heads": Speculative(4, 4, 0.2), "adaptive, threshold 0.3": Adaptive(0.3)}
    table = Table("sampling", "mode", "tokens/s", "accepted", "tokens a pass", "mean loops")
    for name, sampling in {"greedy": Sampling(0.0), "temperature 0.8": Sampling(0.8, seed=0)}.items():
        texts = {}
        for mode, decoding in modes.items():
            started = time.process_time()
            result = generate(model, prompt, GenerationOptions(new_tokens, LOOPS, sampling, decoding))
            seconds = time.process_time() - started
            texts[mode] = result.new_ids_BN
            numbers = result.statistics
            accepted = "-" if numbers.acceptance_rate is None else f"{numbers.acceptance_rate:.0%}"
            rate, a_pass = f"{new_tokens / seconds:.0f}", f"{numbers.tokens_per_pass:.2f}"
            table.add_row(name, mode, rate, accepted, a_pass, f"{numbers.mean_loops:.2f}")
            if name == "greedy" and isinstance(decoding, Speculative):
                assert torch.equal(texts[mode], texts["full depth"]), "speculation changed the text"
    return table


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = corpus_bytes()
    held_out = data[int(0.95 * len(data)) :]
    model = train(data[: int(0.95 * len(data))], options.steps)
    ids = windows(held_out, 24, 257)
    console = Console(width=max(Console().width, 110))
    console.print(depth_table(model, ids))
    console.print(speed_table(model, ids[:1, :64]))


if __name__ == "__main__":
    main()
