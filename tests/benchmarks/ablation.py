"""Architectural ideas on and off at equal training FLOPs, on tasks where depth matters.

    python tests/benchmarks/ablation.py                              # every missing run, then the report
    python tests/benchmarks/ablation.py --tasks mano --rows looped deep --seeds 0 1 --jobs 2
    python tests/benchmarks/ablation.py --report                     # docs/ablation.md and its picture from the store

A run is (task, row, seed): a small model trained in one process with plain AdamW until the row's share of the task's
FLOP budget is spent (``training_flops_per_token`` at the depth each step really draws), then its accuracy on unseen
instances at several depths. Rows differ from the baseline ``looped`` by what ``ROWS`` says and by nothing else: same
data for the same seed, same learning rate, same FLOPs (so a cheaper row takes more steps).

Finished runs are one JSON object a line in the store. A run found there under the same configuration hash is not
repeated, so that the sweep can be interrupted at any time and extended row by row. The hash covers the settings that
differ from their defaults, not the code: after a change of ``model/`` that should count, use another ``--store``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tasks import TEST_STREAM, Addition, Batch, Mano, PHop, Task, draw
from torch import Tensor

from model import IceConfig, IceModel
from model.adaptive_depth import AdaptiveDepth
from model.attention import Cache
from model.expert_parallel import update_selection_biases
from model.init import decays
from model.looped_lm import LoopedOutput
from model.parameters import count_parameters, training_flops_per_token
from pretrain.config import ContrastiveDepthSection, LoopSection
from pretrain.loop_depth import sample_loops, sample_shallow_loop
from pretrain.losses import contrastive_depth_terms, depth_head_loss, mean_loss

ROOT = Path(__file__).resolve().parents[2]
STORE = ROOT / "docs" / "ablation.jsonl"
PAGE = ROOT / "docs" / "ablation.md"
BASELINE = "looped"
BEGIN, END = "<!-- generated: ablation.py --report -->", "<!-- end of the generated part -->"


@dataclass(frozen=True)
class Training:
    """How a run is trained. ``mean_loops`` is the trained depth T; the rest has one value for all rows of a task."""

    mean_loops: int = 4
    distribution: str = "poisson"
    min_loops: int = 1
    grad_loops: int | None = None
    objective: str = "answer"
    budget_flops: float = 1e12
    batch_size: int = 64
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    clip_norm: float = 1.0
    bias_update_rate: float = 1e-3
    test_instances: int = 512


@dataclass(frozen=True)
class Setup:
    """A task with the sizes at which the baseline learns it."""

    task: Task
    model: Mapping[str, Any]
    training: Training


class Reader(NamedTuple):
    """What a reading gave: logits (B, S, V), and how many loops each token took, (B, S) or None for all."""

    logits_BSV: Tensor
    loops_BS: Tensor | None = None


Reading = Callable[[IceModel, Tensor, int], Reader]


def through_cache(make: Callable[[IceConfig], Cache]) -> Reading:
    """Token by token through a decoding cache, as generation would read the same text."""

    def read(model: IceModel, ids_BS: Tensor, depth: int) -> Reader:
        cache = make(model.config)
        pieces = [model(ids_BS[:, i : i + 1], depth, cache=cache) for i in range(ids_BS.shape[1])]
        return Reader(torch.cat(pieces, dim=1))

    return read


def adaptive(threshold: float) -> Reading:
    """Each token as deep as the depth heads say, within the trained depth."""

    def read(model: IceModel, ids_BS: Tensor, depth: int) -> Reader:
        assert model.depth_heads is not None
        controller = AdaptiveDepth(model.depth_heads, threshold)
        logits_BSV = model(ids_BS, depth, controller=controller)
        return Reader(logits_BSV, controller.loops_BS)

    return read


def pooled_cache(window: int) -> Callable[[IceConfig], Cache]:
    """MLCA with ``window`` exact tokens, on a model trained without."""
    return lambda config: Cache.for_model(config.model_copy(update={"mlca_window": window, "mlca_levels": 2}))


@dataclass(frozen=True)
class Row:
    """One line of the table: what differs from the baseline. ``model`` may be computed from the baseline's config."""

    about: str
    model: Mapping[str, Any] | Callable[[IceConfig], Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    readings: Mapping[str, Reading] = field(default_factory=dict)


CACHES: dict[str, Reading] = {
    "per_loop": through_cache(Cache.for_model),
    "ring of 2": through_cache(lambda config: Cache.for_model(config.model_copy(update={"kv_policy": "ring"}))),
    "last": through_cache(lambda config: Cache.for_model(config, kv_policy="last")),
    "MLCA, window 8": through_cache(pooled_cache(8)),
    "MLCA, window 16": through_cache(pooled_cache(16)),
}


# One prelude layer to look around, then the loop does all the work: one block with a small mixture of experts. With
# top-1 a normalised gate is always 1 and the router would get no gradient: the gate stays its sigmoid, times 2.
COMMON: dict[str, Any] = {
    "dim": 64,
    "n_heads": 4,
    "n_kv_heads": 4,
    "prelude_layers": 1,
    "recurrent_layers": 1,
    "coda_layers": 0,
    "ffn_dim": 128,
    "n_experts": 4,
    "n_shared_experts": 0,
    "n_experts_per_tok": 1,
    "expert_dim": 128,
    "route_norm": False,
    "route_scale": 2.0,
}

SETUPS: dict[str, Setup] = {
    "p_hop": Setup(PHop(length=32, alphabet=4, max_hops=4), COMMON, Training(budget_flops=2.4e12)),
    "mano": Setup(Mano(modulus=3, max_operators=3), COMMON, Training(budget_flops=1.25e12)),
    "addition": Setup(Addition(digits=2, max_operands=4, base=5), COMMON, Training(budget_flops=1.6e12)),
}

ROWS: dict[str, Row] = {
    "looped": Row("baseline: one block looped, depth drawn from a Poisson distribution around T"),
    "unlooped": Row("the same parameters run once", training={"mean_loops": 1}),
    "deep": Row(
        "T distinct blocks run once: the baseline's FLOPs a step, T times its core parameters",
        model=lambda base: {"recurrent_layers": base.recurrent_layers * base.max_loop_iters},
        training={"mean_loops": 1},
    ),
    "looped_fixed_depth": Row("T loops in every step", training={"distribution": "fixed"}),
    "lognormal_depth": Row(
        "depth from a log-normal Poisson: a heavier upper tail", training={"distribution": "lognormal_poisson"}
    ),
    "truncated": Row("gradients through the last 2 loops only", training={"grad_loops": 2}),
    "dense_core": Row(
        "one SwiGLU instead of experts, with the hidden width a token uses of them",
        model=lambda base: {"n_experts": 0, "ffn_dim": base.n_experts_per_tok * base.expert_dim},
    ),
    "qk_norm": Row("queries and keys normalised by head", model={"qk_norm": True}),
    "learned_state": Row("h_0 is a learned vector instead of the input", model={"initial_state": "learned"}),
    "random_state": Row("h_0 is noise in training, zero in evaluation", model={"initial_state": "random"}),
    "act": Row(
        "adaptive computation time: halting weights mix the loops' states; ponder cost in the loss",
        model={"act": True},
        training={"objective": "answer_and_ponder"},
    ),
    "uniform_depth": Row("depth uniform between 1 and 2T - 1", training={"distribution": "uniform"}),
    "msrd": Row("three cores, of scales 1, 2 and 4, fused by a gate", model={"msrd_scales": (1, 2, 4)}),
    "moda_v2": Row("attention also sees its position in earlier loops", model={"attn_type": "moda_v2"}),
    "aec": Row("expert outputs reused across loops, in training too", model={"aec": True, "aec_confidence": 0.0}),
    "gdlora": Row("an adapter of rank 8 that knows its loop", model={"lora_rank": 8}),
    "cdl": Row(
        "contrastive depth learning; every step 2 loops or more",
        training={"objective": "contrastive", "min_loops": 2},
    ),
    "slu": Row(
        "depth heads beside the model; every step 2 loops or more",
        model={"slu": True},
        training={"objective": "depth_heads", "min_loops": 2},
        readings={f"adaptive, threshold {threshold:g}": adaptive(threshold) for threshold in (0.5, 0.2, 0.05)},
    ),
    "sliding_window": Row("8 keys, but for every second loop", model={"sliding_window": 8, "full_attention_every": 2}),
    "gated_loops": Row(
        "later loops read the first one's keys, and a gated window of 8 of their own",
        model={"kv_policy": "gated", "kv_gate_window": 8},
    ),
    "sandwich_norm": Row("what attention and feed-forward write is normalised", model={"sandwich_norm": True}),
    "caches": Row("the baseline again, read token by token through other caches", readings=CACHES),
}


def resolve(setup: Setup, row: Row) -> tuple[IceConfig, Training]:
    """The configuration of ``row`` on a task."""
    base = IceConfig(
        **dict(setup.model),
        vocab_size=setup.task.vocab_size,
        max_seq_len=setup.task.sequence_length,
        max_loop_iters=setup.training.mean_loops,
    )
    training = replace(setup.training, **row.training)
    overrides = row.model(base) if callable(row.model) else row.model
    config = IceConfig.model_validate(base.model_dump() | {"max_loop_iters": training.mean_loops} | dict(overrides))
    return config, training


def loop_section(training: Training) -> LoopSection:
    """The settings that draw depths, as a pretraining run has them."""
    return LoopSection.model_validate(
        {
            "distribution": training.distribution,
            "grad_loops": training.grad_loops,
            "min_loops": training.min_loops,
            "cdl": {} if training.objective == "contrastive" else None,
        }
    )


def plan_depths(config: IceConfig, training: Training, tokens: int, seed: int) -> tuple[list[int], float]:
    """The depth of every step, as many steps of ``tokens`` tokens as the FLOP budget pays for; and what they cost."""
    section = loop_section(training)
    cost: dict[int, float] = {}
    depths: list[int] = []
    spent = 0.0
    while True:
        depth = sample_loops(section, training.mean_loops, seed, len(depths))
        if depth not in cost:
            per_token = training_flops_per_token(
                config,
                depth,
                grad_loops=training.grad_loops,
                shallow_reads=int(training.objective == "contrastive"),
                probed=training.objective == "depth_heads",
            )
            cost[depth] = per_token * tokens
        if spent + cost[depth] > training.budget_flops:
            return depths, spent
        spent += cost[depth]
        depths.append(depth)


def answer_loss(output: LoopedOutput, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy of the answers in nats; every other position is free."""
    assert output.losses_BS is not None
    return mean_loss(output.losses_BS, targets_BS)


def answer_and_ponder_loss(output: LoopedOutput, targets_BS: Tensor) -> Tensor:
    """With ACT, also a price on the expected halting loop."""
    return answer_loss(output, targets_BS) + 0.01 * output.ponder_cost


def contrastive_loss(output: LoopedOutput, targets_BS: Tensor) -> Tensor:
    """With CDL's three terms at their default weights."""
    section = ContrastiveDepthSection()
    terms = contrastive_depth_terms(output, targets_BS, section)
    return (
        answer_loss(output, targets_BS)
        + section.shallow_weight * terms["shallow_loss"]
        + section.margin_weight * terms["depth_margin"]
        + section.contrastive_weight * terms["depth_contrast"]
    )


def answer_and_head_loss(output: LoopedOutput, targets_BS: Tensor) -> Tensor:
    """With SLU's depth heads, which learn beside the model."""
    assert output.probe is not None
    return answer_loss(output, targets_BS) + depth_head_loss(output.probe, targets_BS, margin=0.01)


OBJECTIVES: dict[str, Callable[[LoopedOutput, Tensor], Tensor]] = {
    "answer": answer_loss,
    "answer_and_ponder": answer_and_ponder_loss,
    "contrastive": contrastive_loss,
    "depth_heads": answer_and_head_loss,
}


def depths_to_read(training: Training, depth: int, seed: int, step: int) -> dict[str, Any]:
    """The second depth that an objective looks at, drawn as in pretraining."""
    match training.objective:
        case "contrastive":
            return {"read_loops": (sample_shallow_loop(depth, seed, step),)}
        case "depth_heads":
            return {"probe_loop": sample_shallow_loop(depth, seed, step)}
        case _:
            return {}


def lr_factor(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then a cosine down to 5% of the peak."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's arrays, shared with torch."""
    return torch.from_numpy(batch.ids), torch.from_numpy(batch.targets), torch.from_numpy(batch.graded)


def adamw(model: IceModel, training: Training) -> torch.optim.AdamW:
    """Weight decay on matrices only, as in pretraining."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[decays(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": training.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=training.lr,
        betas=training.betas,
    )


def train(
    task: Task, config: IceConfig, training: Training, seed: int, log: Callable[[str], None]
) -> tuple[IceModel, dict[str, Any]]:
    """A trained model, and what training it took. ``seed`` decides weights, data and depths."""
    torch.manual_seed(seed)
    model = IceModel(config).train()
    optimizer = adamw(model, training)
    objective = OBJECTIVES[training.objective]
    depths, flops = plan_depths(config, training, training.batch_size * task.sequence_length, seed)
    losses: deque[float] = deque(maxlen=50)
    curve: list[float] = []
    expert_shares: list[float] = []
    began = time.process_time()  # CPU seconds: other work on the machine does not count
    for step, depth in enumerate(depths):
        for group in optimizer.param_groups:
            group["lr"] = training.lr * lr_factor(step, len(depths), training.warmup_fraction)
        ids, targets, _ = tensors(draw(task, seed, step, training.batch_size))
        reads = depths_to_read(training, depth, seed, step)
        output = model(ids, depth, targets=targets, grad_loops=training.grad_loops, return_output=True, **reads)
        expert_shares.append(float(output.expert_share))
        loss = objective(output, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        if config.n_experts:
            load_LE = model.core.expert_load.take().sum(dim=0)
            update_selection_biases(model, load_LE, training.bias_update_rate)
        losses.append(float(answer_loss(output, targets).detach()))
        if (step + 1) % max(1, len(depths) // 20) == 0:
            curve.append(round(statistics.fmean(losses), 4))
        if (step + 1) % max(1, len(depths) // 5) == 0:
            residual = float(output.loop_residual)
            log(f"step {step + 1}/{len(depths)}, loss {statistics.fmean(losses):.3f}, loop residual {residual:.3f}")
    seconds = time.process_time() - began
    return model, {
        "loss": statistics.fmean(losses),
        "loss_curve": curve,
        "loop_residual": float(output.loop_residual),
        "expert_share": statistics.fmean(expert_shares),
        "steps": len(depths),
        "flops": flops,
        "seconds": seconds,
    }


def read_plainly(model: IceModel, ids_BS: Tensor, depth: int) -> Reader:
    """One forward over the whole sequence."""
    return Reader(model(ids_BS, depth))


def accuracy(model: IceModel, task: Task, depth: int, difficulty: int, instances: int) -> float:
    """Share of right answers on unseen instances of one difficulty, the model run ``depth`` loops."""
    return measure(model, task, depth, difficulty, instances, read_plainly)[0]


@torch.no_grad()
def measure(
    model: IceModel, task: Task, depth: int, difficulty: int, instances: int, reading: Reading
) -> tuple[float, float]:
    """Accuracy under ``reading``, and the mean loops of the graded positions."""
    model.eval()
    right = asked = 0
    loops: list[float] = []
    chunk = min(256, instances)
    for step in range(math.ceil(instances / chunk)):
        batch = draw(task, 0, step, chunk, stream=TEST_STREAM, difficulty=difficulty)
        ids, targets, graded = tensors(batch)
        logits, loops_BS = reading(model, ids, depth)
        loops.append(depth if loops_BS is None else float(loops_BS[graded].float().mean()))
        correct = (logits.argmax(dim=-1) == targets) & graded
        if task.whole_answer:
            right += int((correct | ~graded).all(dim=1).sum())
            asked += chunk
        else:
            right += int(correct.sum())
            asked += int(graded.sum())
    return right / asked, statistics.fmean(loops)


def commonest_answer(task: Task) -> float:
    """Accuracy of always giving the commonest answer to the hardest instances: what knowing nothing scores."""
    batch = draw(task, 0, 0, 4096, stream=TEST_STREAM, difficulty=task.max_difficulty)
    if task.whole_answer:
        _, counts = np.unique(batch.targets, axis=0, return_counts=True)
    else:
        _, counts = np.unique(batch.targets[batch.graded], return_counts=True)
    return float(counts.max() / counts.sum())


def evaluation_depths(trained: int) -> list[int]:
    """1, T/2, T, 2T; for a model that is not looped only 1."""
    return sorted({1, max(1, trained // 2), trained, 2 * trained}) if trained > 1 else [1]


# ---- the sweep


@dataclass(frozen=True)
class Run:
    """One entry of the sweep."""

    task: str
    row: str
    seed: int
    setup: Setup

    @property
    def resolved(self) -> tuple[IceConfig, Training]:
        """What is trained and how."""
        return resolve(self.setup, ROWS[self.row])

    @property
    def config_hash(self) -> str:
        """Of all settings that differ from their defaults, so that a new switch, off, changes no hash."""
        config, training = self.resolved
        default = Training()
        settings = {
            "task": repr(self.setup.task),
            "model": config.model_dump(exclude_defaults=True),
            "training": {k: v for k, v in asdict(training).items() if v != getattr(default, k)},
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def execute(self) -> dict[str, Any]:
        """Train, evaluate, and give back the store's record."""
        torch.set_num_threads(1)
        config, training = self.resolved
        name = f"{self.task}/{self.row}/{self.seed}"
        model, record = train(
            self.setup.task, config, training, self.seed, lambda text: print(f"{name}: {text}", flush=True)
        )
        task, depths = self.setup.task, evaluation_depths(training.mean_loops)
        by_difficulty = {
            difficulty: {
                depth: round(accuracy(model, task, depth, difficulty, training.test_instances), 4) for depth in depths
            }
            for difficulty in range(1, task.max_difficulty + 1)
        }
        readings = {}
        for label, reading in ROWS[self.row].readings.items():
            share, loops = measure(
                model, task, training.mean_loops, task.max_difficulty, training.test_instances, reading
            )
            readings[label] = {"accuracy": round(share, 4), "loops": round(loops, 3)}
        return {
            "task": self.task,
            "row": self.row,
            "seed": self.seed,
            "config_hash": self.config_hash,
            "trained_depth": training.mean_loops,
            "accuracy": by_difficulty[task.max_difficulty],
            "accuracy_by_difficulty": by_difficulty,
            "readings": readings,
            "parameters": count_parameters(config).total,
            **record,
        }


def read_store(store: Path) -> list[dict[str, Any]]:
    """Every finished run. A last line cut off by an interruption is not one."""
    records = []
    for line in store.read_text().splitlines() if store.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{store}: skipping a line that is not JSON", file=sys.stderr)
    return records


def finished(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int, str], Mapping[str, Any]]:
    """Records by (task, row, seed, hash)."""
    return {(r["task"], r["row"], r["seed"], r["config_hash"]): r for r in records}


def sweep(runs: list[Run], store: Path, jobs: int) -> None:
    """Execute what the store lacks, ``jobs`` runs at a time in processes of one thread each."""
    done = finished(read_store(store))
    missing = [run for run in runs if (run.task, run.row, run.seed, run.config_hash) not in done]
    print(f"{len(runs)} runs, {len(missing)} of them missing in {store}", flush=True)
    store.parent.mkdir(parents=True, exist_ok=True)
    if store.exists() and not store.read_text().endswith("\n"):  # an interrupted write: start a line of our own
        with store.open("a") as lines:
            lines.write("\n")
    with contextlib.ExitStack() as stack:
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=context))
            results = (future.result() for future in as_completed([pool.submit(run.execute) for run in missing]))
        else:
            results = (run.execute() for run in missing)
        for count, record in enumerate(results, start=1):
            with store.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            shown = ", ".join(f"{depth}: {value:.3f}" for depth, value in record["accuracy"].items())
            print(
                f"[{count}/{len(missing)}] {record['task']}/{record['row']}/{record['seed']}: {shown} "
                f"({record['steps']} steps, {record['seconds']:.0f} s)",
                flush=True,
            )


def all_runs(setups: Mapping[str, Setup], tasks: list[str], rows: list[str], seeds: list[int]) -> list[Run]:
    """Seed by seed, so that an interrupted sweep has every row at least once."""
    return [Run(task, row, seed, setups[task]) for seed in seeds for task in tasks for row in rows]


# ---- the report


def spread(values: list[float]) -> str:
    """``mean +- sample standard deviation`` in percent."""
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}"


def verdict(values: list[float], baseline: list[float]) -> str:
    """The difference to the baseline in points, and whether it exceeds the two standard deviations put together."""
    difference = 100 * (statistics.fmean(values) - statistics.fmean(baseline))
    if len(values) < 2 or len(baseline) < 2:
        return f"{difference:+.1f} (too few seeds)"
    noise = 100 * math.hypot(statistics.stdev(values), statistics.stdev(baseline))
    if abs(difference) <= noise:
        return f"{difference:+.1f} (within ±{noise:.1f})"
    return f"{difference:+.1f} **{'gain' if difference > 0 else 'loss'}** (spread {noise:.1f})"


def at_depth(records: Iterable[Mapping[str, Any]], depth: int) -> list[float]:
    """Accuracy on the hardest instances at ``depth`` loops, of the records that have that depth."""
    return [r["accuracy"][str(depth)] for r in records if str(depth) in r["accuracy"]]


def depth_table(setup: Setup, records_by_row: Mapping[str, list[Mapping[str, Any]]]) -> list[str]:
    """Accuracy on one task's hardest instances by evaluation depth; rows that do not loop fill the column of T."""
    trained = setup.training.mean_loops
    depths = evaluation_depths(trained)
    titles = [f"**{depth} loops (T)**" if depth == trained else f"{depth} loop{'s' * (depth > 1)}" for depth in depths]
    columns = ["row", "seeds", *titles, f"to `{BASELINE}` at T", "loss", "parameters", "steps", "s a run"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    baseline = at_depth(records_by_row.get(BASELINE, []), trained)
    for row, records in records_by_row.items():
        its_depth = records[0]["trained_depth"]
        reached = at_depth(records, its_depth)
        if its_depth == trained:
            accuracies = [spread(at_depth(records, depth)) for depth in depths]
        else:
            accuracies = [spread(reached) if depth == trained else "" for depth in depths]
        loss, steps, seconds = (statistics.fmean(r[key] for r in records) for key in ("loss", "steps", "seconds"))
        cells = [
            f"`{row}`",
            str(len(records)),
            *accuracies,
            "" if row == BASELINE or not baseline else verdict(reached, baseline),
            f"{loss:.3f}",
            f"{records[0]['parameters']:,}",
            f"{steps:.0f}",
            f"{seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def difficulty_table(setup: Setup, records_by_row: Mapping[str, list[Mapping[str, Any]]]) -> list[str]:
    """Accuracy by difficulty, each row at its trained depth."""
    difficulties = range(1, setup.task.max_difficulty + 1)
    lines = ["| row | " + " | ".join(f"difficulty {d}" for d in difficulties) + " |"]
    lines.append("| --- " * (len(difficulties) + 1) + "|")
    for row, records in records_by_row.items():
        depth = str(records[0]["trained_depth"])
        cells = [spread([r["accuracy_by_difficulty"][str(d)][depth] for r in records]) for d in difficulties]
        lines.append(f"| `{row}` | " + " | ".join(cells) + " |")
    return lines


def reading_table(records_by_row: Mapping[str, list[Mapping[str, Any]]]) -> list[str]:
    """Accuracy at T of trained models that were also read in another way; nothing where no row was."""
    lines: list[str] = []
    for row, records in records_by_row.items():
        trained = records[0]["trained_depth"]
        plain = at_depth(records, trained)
        for label in records[0].get("readings", {}):
            found = [r["readings"][label] for r in records]
            loops = statistics.fmean(reading["loops"] for reading in found)
            cells = [f"`{row}`", label, spread([reading["accuracy"] for reading in found]), spread(plain)]
            lines.append("| " + " | ".join([*cells, f"{loops:.2f}"]) + " |")
    if not lines:
        return []
    header = ["| row | read through | accuracy | read plainly | loops a token |", "| --- | --- | --- | --- | --- |"]
    return ["Read in another way, hardest instances at T:", "", *header, *lines, ""]


def report(setups: Mapping[str, Setup], store: Path, page: Path) -> None:
    """Write the generated part of ``page`` and the picture beside it, from the records whose hash is current."""
    records = finished(read_store(store))
    lines: list[str] = []
    curves: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, setup in setups.items():
        by_row = {
            row: [
                r
                for (task, its_row, seed, config_hash), r in sorted(records.items())
                if (task, its_row) == (name, row) and config_hash == Run(name, row, seed, setup).config_hash
            ]
            for row in ROWS
        }
        by_row = {row: found for row, found in by_row.items() if found}
        if not by_row:
            continue
        curves[name] = by_row
        training = setup.training
        lines += [
            f"### {name}",
            "",
            f"`{setup.task}`, {training.budget_flops:.1e} training FLOPs a run, T = {training.mean_loops}, batch "
            f"{training.batch_size}, lr {training.lr:g}. Accuracy in percent at difficulty {setup.task.max_difficulty} "
            f"(always the commonest answer: {100 * commonest_answer(setup.task):.1f}), loss in nats an answer over the "
            "last 50 steps, seconds of one core; mean ± standard deviation over seeds.",
            "",
            *depth_table(setup, by_row),
            "",
            "By difficulty, each row at its trained depth:",
            "",
            *difficulty_table(setup, by_row),
            "",
            *reading_table(by_row),
        ]
    lines += ["### Rows", "", "| row | what differs from the baseline |", "| --- | --- |"]
    lines += [f"| `{name}` | {row.about} |" for name, row in ROWS.items()]
    write_generated_part(page, "\n".join(lines))
    plot_depth(setups, curves, page.with_name(page.stem + "_depth.png"))


def write_generated_part(page: Path, text: str) -> None:
    """Replace what stands between the two marks; the prose around it is written by hand."""
    old = page.read_text() if page.exists() else f"# Ablation\n\n{BEGIN}\n{END}\n"
    before, rest = old.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def plot_depth(
    setups: Mapping[str, Setup], curves: Mapping[str, Mapping[str, list[Mapping[str, Any]]]], picture: Path
) -> None:
    """Accuracy against evaluation depth: sampled against fixed training, with the unlooped rows as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not curves:
        return
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 4), layout="constrained", squeeze=False)
    looped = {
        "looped": ("depth sampled in training", "tab:blue", "o"),
        "looped_fixed_depth": ("depth fixed in training", "tab:orange", "s"),
    }
    flat = {"deep": ("deep: T distinct blocks", "tab:green"), "unlooped": ("unlooped: one block once", "tab:gray")}
    for axis, (name, by_row) in zip(axes[0], curves.items(), strict=True):
        trained = setups[name].training.mean_loops
        for row, (label, colour, marker) in looped.items():
            if row in by_row:
                depths = evaluation_depths(trained)
                values = [[100 * share for share in at_depth(by_row[row], depth)] for depth in depths]
                error = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
                means = [statistics.fmean(v) for v in values]
                axis.errorbar(depths, means, error, label=label, color=colour, marker=marker, capsize=3)
        for row, (label, colour) in flat.items():
            if row in by_row:
                mean = statistics.fmean(100 * r["accuracy"]["1"] for r in by_row[row])
                axis.axhline(mean, label=label, color=colour, linestyle="--")
        axis.axvline(trained, color="black", linewidth=0.8, linestyle=":", label=f"trained depth T = {trained}")
        axis.set(title=name, xlabel="evaluation depth (loops)", ylabel="accuracy, hardest instances (%)", ylim=(0, 103))
        axis.set_xscale("log", base=2)
        axis.set_xticks(evaluation_depths(trained), [str(depth) for depth in evaluation_depths(trained)])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def smoke_setups() -> dict[str, Setup]:
    """Every task in a size of well under a second a run."""
    return {
        name: replace(setup, training=replace(setup.training, budget_flops=3e9, batch_size=8, test_instances=32))
        for name, setup in SETUPS.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--store", type=Path, default=STORE, help="JSONL file of finished runs")
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown page whose generated part --report rewrites")
    parser.add_argument("--report", action="store_true", help="train nothing, write the page from the store")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything; give a --store of its own")
    chosen = parser.parse_args(arguments)
    if chosen.smoke and STORE in (chosen.store, chosen.page):
        parser.error("--smoke: needs a --store and a --page of its own")
    setups = smoke_setups() if chosen.smoke else SETUPS
    if not chosen.report:
        sweep(all_runs(setups, chosen.tasks, chosen.rows, chosen.seeds), chosen.store, chosen.jobs)
    report(setups, chosen.store, chosen.page)


if __name__ == "__main__":
    main()
