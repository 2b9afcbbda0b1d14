"""Held-out bits per byte: by domain, by source of a mixture, and by loop depth.

``bits per byte = sum of token losses / ln 2 / bytes of UTF-8 text``: comparable across tokenizers, and with a
compressor. Every target counts, the end-of-document ones too, which stand for no byte.

As a command, ``python pretrain/evaluate.py --run DIR`` loads the newest intact checkpoint of a run into the plain model
and sweeps the depth, group by group (``pretrain.depth_groups``): the domains of texts, and of tasks what greedy
decoding solves, by difficulty. Of an Apex model it also tells what its verifier's scores are worth at each step.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

if __name__ == "__main__":
    # In place of this folder, where this file would hide the package ``evaluate`` from the harness.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from data_pipeline.dataset.reader import Dataset
from launch.files import write_json_atomically
from launch.settings import BadInputError, exit_with_status
from model import IceModel
from model.loop_gain import measured_gain
from model.token_loss import IGNORED_TARGET
from pretrain.config import TrainingConfig
from pretrain.data import AnyHeldOut, Batch, TaskHeldOut, held_out_sets, validation_batches
from pretrain.depth_groups import GroupSweep, group_table, task_groups, text_groups
from pretrain.engine import TrainingEngine
from pretrain.loaded_run import load_run
from pretrain.plots import plot_depth_by_group, plot_depth_sweep
from pretrain.tasks.scoring import Score, exact_match
from pretrain.verifier_report import StepReport, report_verifier

_T = TypeVar("_T")


@dataclass(frozen=True)
class Losses:
    """Losses over some held-out text."""

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    text_bytes: int
    bits_per_byte_by_domain: dict[str, float]
    text_bytes_by_domain: dict[str, int]


@dataclass(frozen=True)
class Evaluation(Losses):
    """Losses over held-out sequences of the data set of ``data.path``, and of each source of a mixture.

    ``by_source`` is empty for a run on one data set: there it would say the same again.
    """

    by_source: dict[str, Losses] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopDynamics:
    """Whether the loop has settled, on a few held-out sequences."""

    residual: float  # ||h_T - h_(T-1)|| / ||h_T||, mean over tokens
    gains: list[float]  # spectral radius of the loop's Jacobian at the last state, of each MSRD scale


@dataclass(frozen=True)
class RunEvaluation:
    """What is known of a run's newest checkpoint.

    ``by_loops`` and ``dynamics``: the losses, and what the loop does, by depth. ``exact_match``: by depth, then by
    "source/difficulty"; empty without tasks. ``groups``: both again, group by group. ``verifier``: for each step; empty
    for all but Apex.
    """

    by_loops: dict[int, Evaluation]
    dynamics: dict[int, LoopDynamics]
    exact_match: dict[int, dict[str, Score]]
    groups: list[GroupSweep]
    verifier: list[StepReport]


class Tally:
    """Sums of losses, tokens and bytes by domain; addable over ranks."""

    def __init__(self, domains: Sequence[str], token_bytes_V: Tensor) -> None:
        self._domains, self._token_bytes_V = tuple(domains), token_bytes_V
        self._sums = torch.zeros(3, len(domains), dtype=torch.float64)

    def add(self, batch: Batch, losses_BS: Tensor) -> None:
        """Count one batch by its tokens' losses."""
        targets_BS = batch.targets
        counted_BS = targets_BS != IGNORED_TARGET
        losses = losses_BS.cpu()[counted_BS].double()
        bytes_ = self._token_bytes_V[targets_BS[counted_BS]].double()
        domain = torch.zeros_like(targets_BS) if batch.domain_ids is None else batch.domain_ids
        for row, values in enumerate((losses, torch.ones_like(losses), bytes_)):
            self._sums[row].index_add_(0, domain[counted_BS], values)

    def values(self) -> list[float]:
        """The sums, flat, for a reduction over ranks."""
        return self._sums.flatten().tolist()

    def result(self, summed: Sequence[float] | None = None, domains: Collection[str] | None = None) -> Losses:
        """The losses from these sums or from ``summed`` ones, over all domains or over some."""
        sums = self._sums if summed is None else torch.tensor(summed, dtype=torch.float64).view_as(self._sums)
        wanted = [number for number, name in enumerate(self._domains) if domains is None or name in domains]
        losses, tokens, bytes_ = (row[wanted].sum().item() for row in sums)
        seen = [number for number in wanted if sums[2, number] > 0]
        return Losses(
            bits_per_byte=losses / math.log(2) / max(bytes_, 1.0),
            nats_per_token=losses / max(tokens, 1.0),
            tokens=int(tokens),
            text_bytes=int(bytes_),
            bits_per_byte_by_domain={
                self._domains[number]: float(sums[0, number]) / math.log(2) / max(float(sums[2, number]), 1.0)
                for number in seen
            },
            text_bytes_by_domain={self._domains[number]: int(sums[2, number]) for number in seen},
        )


def combine(
    held_out: Sequence[AnyHeldOut], tallies: Sequence[Tally], summed: Sequence[float] | None = None
) -> Evaluation:
    """The evaluation of data sets, the main one first, from their tallies or the tallies' ``summed`` values in a row.

    A source of which the evaluated sequences hold nothing is left out.
    """
    rest = iter(summed if summed is not None else [value for tally in tallies for value in tally.values()])
    parts = [list(islice(rest, len(tally.values()))) for tally in tallies]
    by_source = {
        name: losses
        for entry, tally, part in zip(held_out, tallies, parts, strict=True)
        for name, domains in entry.sources.items()
        if (losses := tally.result(part, domains)).tokens
    }
    is_mixture = [domains for entry in held_out for domains in entry.sources.values()] != [None]
    return Evaluation(**vars(tallies[0].result(parts[0])), by_source=by_source if is_mixture else {})


class Evaluator:
    """Evaluation inside training: the same held-out sequences every time, spread over the ranks.

    ``eval.sequences`` is a limit for each data set.
    """

    def __init__(self, config: TrainingConfig, held_out: Sequence[AnyHeldOut]) -> None:
        self._held_out = held_out
        self._batch_size = config.eval.micro_batch_size or config.parallel.micro_batch_size
        self._limit = config.eval.sequences
        self._mask = config.data.document_mask
        # All data sets of a run have one tokenizer.
        self._token_bytes_V = torch.from_numpy(held_out[0].dataset.tokenizer.byte_lengths())

    def run(
        self, engine: TrainingEngine, n_loops: int, give_up: Callable[[], bool] = lambda: False
    ) -> Evaluation | None:
        """Evaluate the engine's weights at ``n_loops``; collective, the same result on every rank.

        ``give_up`` is asked before each batch and must answer the same on every rank; None when it said yes.
        """
        tallies = [Tally(entry.dataset.domains, self._token_bytes_V) for entry in self._held_out]
        place = engine.place
        engine.train(False)
        with torch.no_grad():
            for entry, tally in zip(self._held_out, tallies, strict=True):
                for batch in validation_batches(
                    entry, self._batch_size, place.rank, place.world_size, self._limit, self._mask
                ):
                    if give_up():
                        engine.train(True)
                        return None
                    mask = {} if batch.document_ids is None else {"document_ids": batch.document_ids.to(engine.device)}
                    targets_BS = batch.targets.to(engine.device)
                    output = engine.forward(batch.input_ids.to(engine.device), n_loops, targets=targets_BS, **mask)
                    tally.add(batch, output.token_losses_BS)
        engine.train(True)
        summed = engine.sum_over_ranks([value for tally in tallies for value in tally.values()])
        return combine(self._held_out, tallies, summed)


def tally_plain(
    forward: Callable[[Batch], Tensor], batches: Iterable[Batch], domains: Sequence[str], token_bytes_V: Tensor
) -> Tally:
    """Evaluate ``forward`` (a batch to its tokens' losses) in this process alone."""
    tally = Tally(domains, token_bytes_V)
    with torch.no_grad():
        for batch in batches:
            tally.add(batch, forward(batch))
    return tally


def gzip9_bits_per_byte(dataset: Dataset) -> float:
    """What ``gzip -9`` makes of the whole validation text, for scale."""
    manifest = dataset.manifest
    return 8 * manifest.validation_documents.gzip9_bytes / manifest.validation.total.utf8_bytes


def default_depths(mean_loops: int, deepest: int | None = None) -> list[int]:
    """1, 2, T and 2T; and the deepest trained depth and twice that, where ``deepest`` is given."""
    return sorted({1, 2, mean_loops, 2 * mean_loops, *((deepest, 2 * deepest) if deepest else ())})


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _depth_list(text: str) -> list[int]:
    depths = [int(part) for part in text.split(",")]
    if min(depths) < 1:
        raise ValueError
    return depths


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Held-out bits per byte of a run's newest checkpoint, by loop depth.")
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, such as runs/ice_tiny")
    parser.add_argument(
        "--loops", type=_depth_list, metavar="1,2,4", help="depths; default 1, 2, T, 2T, more for tasks"
    )
    parser.add_argument(
        "--sequences",
        type=_positive,
        metavar="N",
        help="how many validation sequences, evenly spaced; default all",
    )
    parser.add_argument(
        "--problems", type=_positive, metavar="N", help="how many problems of each difficulty of a task; default all"
    )
    harness = parser.add_argument_group("lm-evaluation-harness", "instead of held-out text; docs/interchange.md")
    harness.add_argument("--tasks", metavar="NAME,NAME", help="tasks of the harness, or of files in --task-path")
    harness.add_argument("--task-path", type=Path, metavar="DIR", help="a folder of further task files")
    harness.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each question; default the task's"
    )
    harness.add_argument("--limit", type=_positive, metavar="N", help="questions of each task; default all")
    harness.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="requests computed at once")
    options = parser.parse_args(arguments)
    if options.tasks is not None:
        return _run_harness(options)
    evaluation = evaluate_run(options.run, options.loops, options.sequences, options.problems)
    results, dynamics = evaluation.by_loops, evaluation.dynamics
    console = Console()
    table = Table(title=f"held-out bits per byte of {options.run}")
    sources = list(next(iter(results.values())).by_source)
    for column in ("loops", "all", *(f"source {name}" for name in sources), "residual", "gain"):
        table.add_column(column, justify="right")
    for depth, result in results.items():
        table.add_row(
            str(depth),
            f"{result.bits_per_byte:.4f}",
            *(f"{result.by_source[name].bits_per_byte:.4f}" for name in sources),
            f"{dynamics[depth].residual:.3f}",
            " ".join(f"{gain:.2f}" for gain in dynamics[depth].gains),
        )
    console.print(table)
    for measure in ("bits_per_byte", "accuracy"):
        if groups := [group for group in evaluation.groups if group.measure == measure]:
            console.print(group_table(groups))
    if evaluation.verifier:
        console.print(_verifier_table(evaluation.verifier))
    console.print(f"written to {options.run / 'evaluation.json'}", highlight=False)
    return 0


def _run_harness(options: argparse.Namespace) -> int:
    """Multiple choice and generation by lm-evaluation-harness, by depth; into ``harness.json``."""
    try:
        from pretrain.harness import HarnessOptions, evaluate_tasks, metrics_of
    except ModuleNotFoundError as error:
        raise BadInputError(f"--tasks: {error.name} is not installed; pip install -c constraints.txt lm-eval") from None
    loaded = load_run(options.run)
    asked = HarnessOptions(
        tasks=tuple(options.tasks.split(",")),
        include_path=options.task_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        batch_size=options.batch_size,
        seed=loaded.config.run.seed,
    )
    depths = options.loops or [loaded.config.mean_loops]
    by_loops = evaluate_tasks(loaded.model, loaded.tokenizer, depths, asked)
    table = Table(title=f"lm-evaluation-harness on {options.run}")
    for column in ("task", "metric", *(f"{depth} loop{'s' if depth > 1 else ''}" for depth in by_loops)):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task in next(iter(by_loops.values())):
        measured = [{name: (value, error) for name, value, error in metrics_of(of[task])} for of in by_loops.values()]
        for metric in measured[0]:
            cells = (of_depth[metric] for of_depth in measured)
            table.add_row(
                task, metric, *(f"{value:.4f}" + (f" ± {error:.4f}" if error else "") for value, error in cells)
            )
    console = Console()
    console.print(table)
    path = options.run / "harness.json"
    write_json_atomically(path, {"checkpoint": loaded.checkpoint.name, "by_loops": by_loops})
    console.print(f"written to {path}", highlight=False)
    return 0


def _verifier_table(steps: list[StepReport]) -> Table:
    table = Table(title="the verifier: scores against what was right, before and after calibration")
    for column in ("step", "tokens", "accuracy", "mean score", "Brier", "ECE", "calibrated Brier", "calibrated ECE"):
        table.add_column(column, justify="right")
    for step in steps:
        numbers = (step.accuracy, step.mean_score, step.brier, step.ece, step.calibrated_brier, step.calibrated_ece)
        table.add_row(str(step.step), f"{step.tokens:,}", *(f"{number:.3f}" for number in numbers))
    return table


def evaluate_run(
    run: Path, depths: list[int] | None = None, sequences: int | None = None, problems: int | None = None
) -> RunEvaluation:
    """Evaluate the newest intact checkpoint of ``run`` at ``depths`` on ``sequences`` of the validation split.

    ``problems`` limits those of each difficulty of a task. None means the default depths, the whole split, and all
    problems. Writes ``evaluation.json`` and pictures.
    """
    loaded = load_run(run)
    config, model = loaded.config, loaded.model
    held_out = held_out_sets(config.data, loaded.dataset)
    batch_size = config.eval.micro_batch_size or config.parallel.micro_batch_size
    batches = [
        list(validation_batches(entry, batch_size, 0, 1, sequences, config.data.document_mask)) for entry in held_out
    ]
    token_bytes_V = torch.from_numpy(loaded.tokenizer.byte_lengths())
    results: dict[int, Evaluation] = {}
    dynamics: dict[int, LoopDynamics] = {}
    exact: dict[int, dict[str, Score]] = {}
    has_tasks = any(isinstance(entry, TaskHeldOut) for entry in held_out)
    for depth in depths or default_depths(config.mean_loops, config.deepest_step if has_tasks else None):

        def forward(batch: Batch, n_loops: int = depth) -> Tensor:
            output = model(
                batch.input_ids, n_loops, targets=batch.targets, document_ids=batch.document_ids, return_output=True
            )
            losses_BS: Tensor = output.token_losses_BS
            return losses_BS

        tallies = []
        for entry, of_entry in zip(held_out, batches, strict=True):
            watched = _watched(of_entry, f"evaluating at {depth} loops")
            tallies.append(tally_plain(forward, watched, entry.dataset.domains, token_bytes_V))
        results[depth] = combine(held_out, tallies)
        dynamics[depth] = _measure_dynamics(model, batches[0][0].input_ids[:4], depth)
        if solved := _solve(model, held_out, depth, problems):
            exact[depth] = solved
    groups = [*text_groups(results, held_out), *task_groups(exact, held_out)]
    verifier = report_verifier(model, batches[0], config.mean_loops) if config.model.core == "apex" else []
    write_json_atomically(
        run / "evaluation.json",
        {
            "checkpoint": loaded.checkpoint.name,
            "by_loops": {depth: asdict(result) | asdict(dynamics[depth]) for depth, result in results.items()},
            **({"exact_match": _plain_scores(exact)} if exact else {}),
            "trained_loops": [config.shallowest_step, config.deepest_step],
            "groups": [asdict(group) for group in groups],
            **({"verifier": [asdict(step) for step in verifier]} if verifier else {}),
        },
    )
    plot_depth_sweep(
        {depth: result.bits_per_byte for depth, result in results.items()},
        config.mean_loops,
        run / "plots" / "depth.png",
    )
    if groups:
        plot_depth_by_group(groups, (config.shallowest_step, config.deepest_step), run / "plots" / "depth_by_group.png")
    return RunEvaluation(results, dynamics, exact, groups, verifier)


def _solve(model: IceModel, held_out: Sequence[AnyHeldOut], n_loops: int, limit: int | None = None) -> dict[str, Score]:
    """Exact match on every task's held-out problems, ``limit`` of each difficulty, by "source/difficulty"."""
    scores: dict[str, Score] = {}
    for entry in held_out:
        if isinstance(entry, TaskHeldOut):
            (source, *_) = entry.sources
            problems = entry.first_problems(limit)
            watch = partial(_watched, description=f"solving at {n_loops} loops")
            by_difficulty = exact_match(model, entry.dataset, problems, n_loops, watch)
            scores |= {f"{source}/{difficulty}": score for difficulty, score in by_difficulty.items()}
    return scores


def _watched(work: list[_T], description: str) -> Iterable[_T]:
    """The pieces of work, with a progress bar on a terminal."""
    return track(work, description=description, transient=True, disable=not sys.stdout.isatty())


def _plain_scores(by_loops: dict[int, dict[str, Score]]) -> dict[int, dict[str, dict[str, float | None]]]:
    return {
        depth: {name: asdict(score) | {"accuracy": score.accuracy} for name, score in scores.items()}
        for depth, scores in by_loops.items()
    }


def _measure_dynamics(model: IceModel, input_ids_BS: Tensor, n_loops: int) -> LoopDynamics:
    with torch.no_grad():
        residual = model(input_ids_BS, n_loops, return_output=True).loop_residual.item()
    return LoopDynamics(residual, measured_gain(model, input_ids_BS, n_loops))


if __name__ == "__main__":
    exit_with_status(main)
