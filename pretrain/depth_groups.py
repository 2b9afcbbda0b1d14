"""A depth sweep group by group: what more loops do for each domain of a text, and each difficulty of a task.

A *group* is a domain of the manifest, measured in held-out bits a byte (lower is better), or a difficulty of a task,
measured by the share of held-out problems that greedy decoding solves (higher is better). One number over all hides
what looped models are about: easy groups need few loops, hard ones more, and what lies beyond training most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from rich.table import Table

from pretrain.data import AnyHeldOut, TaskHeldOut

if TYPE_CHECKING:
    from pretrain.evaluate import Evaluation, Losses
    from pretrain.tasks.scoring import Score

_T = TypeVar("_T")

_TITLES = {
    "bits_per_byte": "held-out bits per byte of each domain, by loops",
    "accuracy": "held-out problems solved by greedy decoding, by loops (loops used where the core counts them)",
}


@dataclass(frozen=True)
class GroupSweep:
    """One group of a source of the mixture, at each depth of a sweep.

    ``size`` is bytes of text, or problems. ``loops_used``: mean over the positions that write answers; empty where the
    core does not count them.
    """

    source: str
    group: str
    measure: Literal["bits_per_byte", "accuracy"]
    size: int
    trained: bool  # False: a difficulty beyond any that training has
    by_loops: dict[int, float]
    loops_used: dict[int, float]

    @property
    def description(self) -> str:
        """The group's name, and whether it lies beyond training."""
        return self.group if self.trained else f"{self.group}, beyond training"


def text_groups(by_loops: Mapping[int, Evaluation], held_out: Sequence[AnyHeldOut]) -> list[GroupSweep]:
    """The domains of every source that is text, in the order of the mixture; ``held_out`` has the main data set first.

    A main data set that is no source comes first, under its folder's name. What the evaluated sequences hold nothing
    of is left out.
    """
    sweeps: dict[str, dict[int, Losses]] = {}
    main = held_out[0]
    if not isinstance(main, TaskHeldOut) and (not main.sources or not _first(by_loops).by_source):
        # Not told apart from the whole: a run on one data set does not repeat it as a source.
        (name, *_) = (*main.sources, main.dataset.folder.name)
        sweeps[name] = dict(by_loops)
    for name in (name for entry in held_out if not isinstance(entry, TaskHeldOut) for name in entry.sources):
        if name in _first(by_loops).by_source:
            sweeps[name] = {depth: evaluation.by_source[name] for depth, evaluation in by_loops.items()}
    return [
        GroupSweep(
            source=name,
            group=domain,
            measure="bits_per_byte",
            size=size,
            trained=True,
            by_loops={depth: losses.bits_per_byte_by_domain[domain] for depth, losses in sweep.items()},
            loops_used={},
        )
        for name, sweep in sweeps.items()
        for domain, size in _first(sweep).text_bytes_by_domain.items()
    ]


def task_groups(by_loops: Mapping[int, Mapping[str, Score]], held_out: Sequence[AnyHeldOut]) -> list[GroupSweep]:
    """The difficulties of every task; ``by_loops`` has the scores by depth, then by "source/difficulty"."""
    groups = []
    for entry in held_out:
        if not isinstance(entry, TaskHeldOut):
            continue
        (source, *_) = entry.sources
        for difficulty in entry.dataset.domains:
            sweep = {depth: scores[f"{source}/{difficulty}"] for depth, scores in by_loops.items()}
            group = GroupSweep(
                source=source,
                group=difficulty,
                measure="accuracy",
                size=_first(sweep).problems,
                trained=difficulty in entry.dataset.task.difficulties,
                by_loops={depth: score.accuracy for depth, score in sweep.items()},
                loops_used={depth: score.loops_used for depth, score in sweep.items() if score.loops_used is not None},
            )
            groups.append(group)
    return groups


def group_table(groups: Sequence[GroupSweep]) -> Table:
    """Groups of one measure, a line each, a column for each depth."""
    is_text = groups[0].measure == "bits_per_byte"
    table = Table(title=_TITLES[groups[0].measure])
    table.add_column("source")
    table.add_column("domain" if is_text else "difficulty")
    for column in ("bytes" if is_text else "problems", *map(str, groups[0].by_loops)):
        table.add_column(column, justify="right")
    for group in groups:
        cells = []
        for depth, value in group.by_loops.items():
            used = f" ({group.loops_used[depth]:.2f})" if depth in group.loops_used else ""
            cells.append(f"{value:.4f}" if is_text else f"{value:.1%}{used}")
        table.add_row(group.source, group.description, f"{group.size:,}", *cells)
    return table


def _first(by_loops: Mapping[int, _T]) -> _T:
    """What any depth has: the evaluated sequences and problems are the same at all of them."""
    return next(iter(by_loops.values()))
