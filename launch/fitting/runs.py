"""Finished runs as the fits see them: ``results.jsonl`` of one or more sweeps, as columns.

A row is what ``launch/sweep.py`` writes (``launch/sweeping/results.py``). Of its parameters a fit counts those that do
the work, apart by how often they do it:

    once       prelude, coda, norms: N_once
    recurrent  the looped core:      N_rec

``active`` counts a token's own experts only, ``non_embedding`` all experts, and ``total`` also the embedding and the
head (in ``once``). Losses are held out, in nats a token or in bits a byte, at the run's own mean depth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from launch.settings import BadInputError, parse_settings

Floats = NDArray[np.float64]
Counted = Literal["active", "non_embedding", "total"]
LossUnit = Literal["nats", "bits"]
COUNTED: tuple[Counted, ...] = get_args(Counted)
LOSS_UNITS: dict[LossUnit, str] = {"nats": "nats a token", "bits": "bits a byte"}
_AGAIN = "collect the sweep again: python launch/sweep.py FILE --collect"


class _Row(BaseModel):
    """A part of a row; what a fit does not need is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ParameterCounts(_Row):
    """Of a model, as ``launch/budget.py`` counts them."""

    total: PositiveInt
    non_embedding: PositiveInt
    once: NonNegativeInt
    recurrent: PositiveInt
    active_recurrent: PositiveInt


class DepthLosses(_Row):
    """Held out, at some depth at test time."""

    validation_loss: PositiveFloat
    bits_per_byte: PositiveFloat


class ExecutedBudget(_Row):
    """What was executed, rather than asked for."""

    executed_loops: PositiveFloat


class ResultRow(_Row):
    """A finished cell of a sweep."""

    cell: str
    size: str
    seed: NonNegativeInt
    mean_loops: PositiveInt
    flops_level: PositiveFloat | None
    parameters: ParameterCounts
    tokens: PositiveInt
    training_flops: PositiveFloat
    validation_loss: PositiveFloat
    bits_per_byte: PositiveFloat
    by_loops: dict[PositiveInt, DepthLosses] | None
    config_hash: str
    data: dict[str, str]
    budget: ExecutedBudget

    def loss(self, unit: LossUnit) -> float:
        """The held-out loss at the run's own depth."""
        return self.validation_loss if unit == "nats" else self.bits_per_byte

    def losses_by_loops(self, unit: LossUnit) -> dict[int, float]:
        """The held-out losses by depth at test time; empty when the cell was never evaluated so."""
        found = sorted((self.by_loops or {}).items())
        return {loops: at.validation_loss if unit == "nats" else at.bits_per_byte for loops, at in found}

    def counts(self, counted: Counted) -> tuple[int, int]:
        """``N_once, N_rec``."""
        parameters = self.parameters
        once = parameters.once
        if counted == "total":
            once = parameters.total - parameters.recurrent
        return once, parameters.active_recurrent if counted == "active" else parameters.recurrent


@dataclass(frozen=True)
class Points:
    """Where a law is evaluated: columns of equal length (or that broadcast to one)."""

    once: Floats  # parameters passed once
    recurrent: Floats  # parameters of the looped core
    loops: Floats
    tokens: Floats

    @property
    def unique(self) -> Floats:
        """Parameters, each counted once however often it loops."""
        return self.once + self.recurrent

    def where(self, chosen: NDArray[np.bool_]) -> Points:
        """The points that ``chosen`` marks."""
        return Points(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class Runs:
    """All runs of a fit, as columns."""

    rows: tuple[ResultRow, ...]
    points: Points
    flops: Floats  # of the training
    executed_loops: Floats
    loss: Floats
    unit: LossUnit

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, chosen: NDArray[np.bool_]) -> Runs:
        """The runs that ``chosen`` marks."""
        rows = tuple(row for row, kept in zip(self.rows, chosen, strict=True) if kept)
        columns = (self.flops[chosen], self.executed_loops[chosen], self.loss[chosen])
        return Runs(rows, self.points.where(chosen), *columns, self.unit)


def read_rows(paths: Sequence[Path]) -> list[ResultRow]:
    """The rows of all files, by name. Raises ``BadInputError`` for a row that a fit cannot use, or twice the same."""
    rows: list[ResultRow] = []
    places: dict[str, str] = {}
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise BadInputError(f"{path}: no such file; name the results.jsonl of a sweep") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}: line {number}"
            row = _parse_row(line, place)
            same = places.setdefault(row.config_hash, place)
            if same != place:
                raise BadInputError(f"{place}: cell = {row.cell}: the same run as {same}; name each result once")
            rows.append(row)
    if not rows:
        raise BadInputError(f"{', '.join(map(str, paths))}: no finished cell; run the sweep first, or {_AGAIN}")
    rows.sort(key=lambda row: (row.cell, row.config_hash))
    return rows


def _parse_row(line: str, place: str) -> ResultRow:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{place}: not JSON ({error}); {_AGAIN}") from None
    if not isinstance(values, dict):
        raise BadInputError(f"{place}: holds a {type(values).__name__}, not a row; {_AGAIN}")
    try:
        return parse_settings(ResultRow, values, place)
    except BadInputError as error:
        raise BadInputError(f"{error}; {_AGAIN}") from None


def as_runs(rows: Sequence[ResultRow], counted: Counted, unit: LossUnit) -> Runs:
    """The columns of ``rows``; ``BadInputError`` when their losses cannot be compared, being of different data."""
    first = rows[0]
    for row in rows:
        if sorted(row.data.values()) != sorted(first.data.values()):
            raise BadInputError(
                f"data: {row.cell} and {first.cell} were trained on different data ({', '.join(sorted(row.data))} and "
                f"{', '.join(sorted(first.data))}, by fingerprint); fit them apart"
            )
    counts = np.array([row.counts(counted) for row in rows], dtype=np.float64)

    def column(values: Sequence[float]) -> Floats:
        return np.array(values, dtype=np.float64)

    return Runs(
        rows=tuple(rows),
        points=Points(
            once=counts[:, 0],
            recurrent=counts[:, 1],
            loops=column([row.mean_loops for row in rows]),
            tokens=column([row.tokens for row in rows]),
        ),
        flops=column([row.training_flops for row in rows]),
        executed_loops=column([row.budget.executed_loops for row in rows]),
        loss=column([row.loss(unit) for row in rows]),
        unit=unit,
    )
