"""What adaptive expert caching saves and what it costs, on a small byte-level model of English.

    nice -n 10 python tests/benchmarks/aec.py            # the numbers of docs/aec.md: 10 minutes, one core
    python tests/benchmarks/aec.py --steps 20 --tokens 4096      # a look at how it runs

Two models of the same weights and data: one trained without AEC, one with its default thresholds. Both are evaluated
on held-out text without AEC and with it at several thresholds, at the trained depth: how many of the routed experts'
rows were not computed, the change of the loss in bits per byte, and the time of a forward relative to the same model
without AEC (median of alternating pairs in this process; the thread's CPU time, which is the wall clock's on a free
core). Beside them the rival that needs no code: the same model run for fewer loops. A table before that shows why: how
settled the experts' input is from one loop to the next.

Text: ``data_pipeline/corpus/austen.jsonl.xz``, the last twentieth of its documents held out, a byte a token.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # data_pipeline.py beside this is a benchmark

from model import IceConfig, IceModel
from model.expert_cache import ExpertCache
from model.expert_parallel import update_selection_biases
from model.init import decays
from model.parameters import count_parameters
from pretrain.config import LoopSection
from pretrain.loop_depth import sample_loops

CORPUS = Path(__file__).resolve().parents[2] / "data_pipeline" / "corpus" / "austen.jsonl.xz"
LENGTH, BATCH, LR, WARMUP = 128, 8, 3e-3, 40
DEPTH = LoopSection.model_validate({"distribution": "poisson"})
MODEL = IceConfig(
    vocab_size=256,
    dim=64,
    max_seq_len=LENGTH,
    max_output_tokens=LENGTH,
    prelude_layers=1,
    recurrent_layers=1,
    coda_layers=1,
    max_loop_iters=6,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=256,
    n_experts=8,
    n_experts_per_tok=2,
    expert_dim=256,
)
THRESHOLDS = [  # aec_confidence, aec_drift, aec_max_age
    *((0.0, drift, 4) for drift in (0.05, 0.1, 0.2, 0.4, math.inf)),
    (0.5, 0.1, 4),  # the defaults
    (0.5, 0.2, 4),
    (0.7, 0.2, 4),
    (0.0, 0.2, 1),
    (0.0, 0.4, 1),
]


class Evaluation(NamedTuple):
    """Held-out bits per byte, and the share of routed expert rows that were computed."""

    bits_per_byte: float
    share: float


def corpus() -> tuple[Tensor, Tensor]:
    """Training and held-out bytes, int64."""
    with lzma.open(CORPUS, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"].encode() for line in lines]
    cut = len(documents) * 19 // 20
    train, held_out = (b"\n\n".join(part) for part in (documents[:cut], documents[cut:]))
    return torch.tensor(list(train)), torch.tensor(list(held_out))


def with_fields(config: IceConfig, **fields: object) -> IceConfig:
    return IceConfig.model_validate(config.model_dump() | fields)


def train(config: IceConfig, text: Tensor, steps: int, seed: int) -> IceModel:
    """``steps`` steps of AdamW at a sampled depth around T; the same weights, batches and depths for every config."""
    torch.manual_seed(seed)
    model = IceModel(config).train()
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    draw = torch.Generator().manual_seed(seed)
    recent: list[float] = []
    shares: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        starts = torch.randint(0, len(text) - LENGTH, (BATCH,), generator=draw)
        ids = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        output = model(ids[:, :-1], sample_loops(DEPTH, config.max_loop_iters, seed, step), return_output=True)
        loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_selection_biases(model, model.core.expert_load.take().sum(dim=0), rate=0.001)
        recent, shares = [*recent[-49:], loss.item()], [*shares, output.expert_share.item()]
    print(
        f"aec = {config.aec}: {steps} steps, {time.perf_counter() - began:.0f} s, "
        f"training loss {statistics.fmean(recent) / math.log(2):.3f} bits per byte, "
        f"share of expert rows computed {statistics.fmean(shares):.2f}",
        flush=True,
    )
    return model.eval()


def batches(text: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (BATCH, LENGTH), the first ``tokens`` tokens without overlap."""
    ids = text[: tokens // (BATCH * LENGTH) * BATCH * LENGTH + 1]
    inputs, targets = ids[:-1].view(-1, BATCH, LENGTH), ids[1:].view(-1, BATCH, LENGTH)
    yield from zip(inputs, targets, strict=True)


def set_cache(model: IceModel, thresholds: tuple[float, float, int] | None) -> None:
    """Switch a trained model's AEC on or off: it has no weights."""
    for block in model.core.blocks:
        block.expert_cache = None
        if thresholds is not None:
            names = ("aec_confidence", "aec_drift", "aec_max_age")
            block.expert_cache = ExpertCache(
                with_fields(model.config, aec=True, **dict(zip(names, thresholds, strict=True)))
            )


@torch.no_grad()
def evaluate(model: IceModel, text: Tensor, tokens: int, n_loops: int | None = None) -> Evaluation:
    losses, shares = [], []
    for inputs, targets in batches(text, tokens):
        output = model(inputs, n_loops, return_output=True)
        losses.append(float(F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())))
        shares.append(float(output.expert_share))
    return Evaluation(statistics.fmean(losses) / math.log(2), statistics.fmean(shares))


class Variant(NamedTuple):
    """A way to run a trained model."""

    thresholds: tuple[float, float, int] | None = None
    n_loops: int | None = None


@torch.no_grad()
def time_ratio(model: IceModel, variant: Variant, text: Tensor, repeats: int = 15) -> float:
    """CPU seconds of a forward of ``variant`` / of the model at its trained depth without AEC; median of pairs."""
    inputs, _ = next(batches(text, BATCH * LENGTH))
    ratios = []
    for _ in range(repeats):
        seconds = []
        for each in (variant, Variant()):
            set_cache(model, each.thresholds)
            began = time.thread_time()
            model(inputs, each.n_loops)
            seconds.append(time.thread_time() - began)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


@torch.no_grad()
def print_settling(model: IceModel, text: Tensor) -> None:
    """From loop to loop, without AEC: how far x moves, how often the experts stay, how sure the router is."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def look(module: torch.nn.Module, inputs: tuple[Tensor], routes: tuple[Tensor, Tensor, Tensor]) -> None:
        scores = F.linear(inputs[0], module.weight).sigmoid().gather(1, routes[1])
        seen.append((inputs[0], routes[1].sort(dim=1).values, scores.mean(1)))

    set_cache(model, None)
    hook = model.core.blocks[0].ffn.router.register_forward_hook(look)
    model(next(batches(text, BATCH * LENGTH))[0])
    hook.remove()
    print("\n| loop | moved, median | moved, least tenth | same experts | confidence, median |")
    print("| --- | --- | --- | --- | --- |")
    for loop in range(1, len(seen)):
        (x, experts, _), (new, new_experts, confidence) = seen[loop - 1], seen[loop]
        moved = (new - x).norm(dim=1) / x.norm(dim=1)
        same = float((experts == new_experts).all(dim=1).float().mean())
        median, tenth = float(moved.median()), float(moved.quantile(0.1))
        print(f"| {loop + 1} | {median:.3f} | {tenth:.3f} | {same:.2f} | {float(confidence.median()):.2f} |")


def print_table(model: IceModel, text: Tensor, tokens: int) -> None:
    config = model.config
    routed = config.max_loop_iters * config.n_experts_per_tok * 3 * config.expert_dim * config.dim
    routed_part = routed / count_parameters(config).executed
    set_cache(model, None)
    plain = evaluate(model, text, tokens)
    print(
        f"\nwithout AEC {plain.bits_per_byte:.4f} bits per byte; routed experts are {routed_part:.0%} of all products"
    )
    print("\n| confidence | drift | age | expert rows saved | all products saved | bits per byte | time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for thresholds in THRESHOLDS:
        set_cache(model, thresholds)
        result = evaluate(model, text, tokens)
        saved, change = 1 - result.share, result.bits_per_byte - plain.bits_per_byte
        ratio = time_ratio(model, Variant(thresholds), text)
        names = " | ".join(f"{value:g}" for value in thresholds)
        print(f"| {names} | {saved:.1%} | {saved * routed_part:.1%} | {change:+.4f} | {ratio:.2f} |", flush=True)

    print("\n| loops, without AEC | all products saved | bits per byte | time |\n| --- | --- | --- | --- |")
    set_cache(model, None)
    for n_loops in range(1, config.max_loop_iters):
        saved = 1 - count_parameters(config, n_loops).executed / count_parameters(config).executed
        change = evaluate(model, text, tokens, n_loops).bits_per_byte - plain.bits_per_byte
        ratio = time_ratio(model, Variant(n_loops=n_loops), text)
        print(f"| {n_loops} | {saved:.1%} | {change:+.4f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--tokens", type=int, default=32768, help="held-out bytes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training_text, held_out = corpus()
    for aec in (False, True):
        model = train(with_fields(MODEL, aec=aec), training_text, arguments.steps, arguments.seed)
        print_settling(model, held_out)
        print_table(model, held_out, arguments.tokens)
        print(flush=True)


if __name__ == "__main__":
    main()
