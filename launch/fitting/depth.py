r"""Loss against loops, of one model or of one size: ``L(T) = L_inf + Z exp(-z T)``.

Prairie et al. 2026, *Parcae: Scaling Laws For Stable Looped Language Models*: more loops at test time help less and
less, exponentially; Geiping et al. 2025 (*Scaling up Test-Time Compute with Latent Reasoning*) show the same curve.
``L_inf`` is what no number of loops goes below, Z what depth is worth in all, ``1 / z`` the loops in which that shrinks
by a factor e. Two kinds of series have that form, and they are never mixed:

    test      one trained model, evaluated at several depths (``launch/sweep.py --evaluate``)
    training  models of one size and as many tokens, trained at several mean depths

The law cannot rise: a loss that gets worse beyond the trained depth shows as a misfit.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launch.fitting.bootstrap import Interval, interval_of, residual_resamples
from launch.fitting.huber import Law, Problem
from launch.fitting.runs import Floats, LossUnit, ResultRow

LEAST_DEPTHS = 4  # three coefficients, and a point that could contradict them
DELTA = 1e-2  # of Huber's loss: of so few points, all much alike, none is an outlier
NEAR = 0.001  # what counts as having arrived, relative to L_inf
_SAME_TOKENS = 0.02


class Saturating(Law[Floats]):
    """The law; its points are loops. Coordinates: ``log L_inf``, ``log Z exp(-z T0)``, ``log z``, T0 the least T."""

    title = "depth"
    equation = "L = L_inf + Z exp(-z T)"
    names = ("L_inf", "Z", "z")

    def __init__(self, loops_N: Floats, loss_N: Floats) -> None:
        self._least, self._most = float(loss_N.min()), float(loss_N.max())
        self._T0 = float(loops_N.min())
        least, most = math.log(self._least), math.log(self._most)
        # A little noise at great depth must not stop L_inf at the least loss that was measured.
        self.bounds = (
            (least - 7, least + 0.5 * (most - least)),
            (most - 14, most + 1),
            (math.log(1e-3), math.log(10.0)),
        )

    def log_loss(self, x_P: Floats, points: Floats) -> Floats:
        """Log of the predicted losses."""
        log_loss: Floats = np.logaddexp(x_P[0], x_P[1] - math.exp(x_P[2]) * (points - self._T0))
        return log_loss

    def gradient(self, x_P: Floats, points: Floats) -> tuple[Floats, Floats]:
        """The same, and its derivatives."""
        log_loss, z = self.log_loss(x_P, points), math.exp(x_P[2])
        beyond = points - self._T0
        share = np.exp(x_P[1] - z * beyond - log_loss)
        return log_loss, np.stack([1 - share, share, -share * z * beyond], axis=-1)

    def grid(self) -> Floats:
        """L_inf below the least loss by some of the range, and rates from slow to fast."""
        fall = max(self._most - self._least, 1e-6 * self._least)
        return np.array(
            [
                [
                    math.log(max(self._least - part * fall, 0.1 * self._least)),
                    math.log(self._most - max(self._least - part * fall, 0.1 * self._least)),
                    math.log(z),
                ]
                for part, z in itertools.product((0.001, 0.1, 0.5, 2.0), (0.02, 0.1, 0.3, 0.7, 1.5, 3.0))
            ]
        )

    def coefficients(self, x_P: Floats) -> dict[str, float]:
        """L_inf, Z, z."""
        z = math.exp(float(x_P[2]))
        return {"L_inf": math.exp(float(x_P[0])), "Z": math.exp(min(float(x_P[1]) + z * self._T0, 700)), "z": z}


@dataclass(frozen=True)
class DepthSeries:
    """Losses by loops, in order of depth; ``trained_loops`` of a model, None of a series of several."""

    name: str
    kind: Literal["test", "training"]
    trained_loops: int | None
    loops: tuple[int, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class DepthFit:
    """The law of one series. ``enough_loops``: from where on the loss is within 0.1% of L_inf; at least 1."""

    series: DepthSeries
    coefficients: dict[str, float]
    intervals: dict[str, Interval | None]
    enough_loops: float
    worst_error: float  # relative, of the law at its own points
    converged: bool

    def predict(self, loops: Floats) -> Floats:
        """The law's losses."""
        values = self.coefficients
        predicted: Floats = values["L_inf"] + values["Z"] * np.exp(-values["z"] * loops)
        return predicted


def depth_series(rows: Sequence[ResultRow], unit: LossUnit) -> list[DepthSeries]:
    """Every series of ``rows`` with enough depths, those of single models first."""
    found = []
    for row in sorted(rows, key=lambda row: (row.mean_loops, row.cell)):
        by_loops = row.losses_by_loops(unit)
        if len(by_loops) >= LEAST_DEPTHS:
            found.append(DepthSeries(row.cell, "test", row.mean_loops, tuple(by_loops), tuple(by_loops.values())))
    trained: dict[tuple[str, int], list[ResultRow]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row.size, row.tokens)):
        # Cells of as many tokens differ by a step at most.
        same = [key for key in trained if key[0] == row.size and abs(row.tokens / key[1] - 1) <= _SAME_TOKENS]
        trained[same[0] if same else (row.size, row.tokens)].append(row)
    for (size, tokens), group in trained.items():
        if len({row.mean_loops for row in group}) >= LEAST_DEPTHS:
            ordered = sorted(group, key=lambda row: (row.mean_loops, row.seed))
            loops, losses = tuple(row.mean_loops for row in ordered), tuple(row.loss(unit) for row in ordered)
            found.append(DepthSeries(f"{size}, {tokens:,} tokens", "training", None, loops, losses))
    return found


def fit_depth(series: DepthSeries, resamples: int, level: float, generator: np.random.Generator) -> DepthFit:
    """The law of ``series``; its intervals from resampled errors, since four depths cannot be drawn from."""
    loops_N, loss_N = np.array(series.loops, dtype=np.float64), np.array(series.loss)
    law = Saturating(loops_N, loss_N)
    problem, weights_N = Problem(law, loops_N, DELTA), np.ones_like(loops_N)
    best = problem.solve(np.log(loss_N), weights_N)
    predicted_N = law.log_loss(best.x_P, loops_N)
    coefficients = law.coefficients(best.x_P)
    drawn = residual_resamples(problem, best, np.log(loss_N), resamples, generator)
    samples = [law.coefficients(fit.x_P) for fit in drawn]
    intervals = {name: interval_of([sample[name] for sample in samples], level) for name in law.names}
    excess = coefficients["Z"] / (NEAR * coefficients["L_inf"])
    return DepthFit(
        series,
        coefficients,
        intervals,
        enough_loops=max(1.0, math.log(max(excess, 1e-300)) / coefficients["z"]),
        worst_error=float(np.abs(np.expm1(predicted_N - np.log(loss_N))).max()),
        converged=best.converged,
    )
