r"""The best size at each FLOP level, read from parabolas: approach 2 of Hoffmann et al. 2022.

On a level, and at one mean depth, the loss against log N is nearly a parabola around its least value; the minima of
several levels give ``N ~ C^a`` without a law of losses. It needs sizes on both sides: a parabola that has its minimum
outside the sizes measured, or none, is said to, and gives no exponent. Wide levels bend the parabola and bias it, which
a look at the picture shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.fitting.bootstrap import Interval, draw_runs, interval_of
from launch.fitting.chinchilla import distinct
from launch.fitting.runs import Floats, Runs

LEAST_SIZES = 3


@dataclass(frozen=True)
class Parabola:
    """Loss on one FLOP level at one depth: ``loss = c0 + c1 u + c2 u^2``, ``u = log(N / centre)``.

    The best values are None when the parabola has no minimum. ``inside``: it has one among the sizes measured.
    """

    flops_level: float
    mean_loops: int
    runs: tuple[int, ...]  # their places in the fit's runs
    centre: float
    terms: tuple[float, float, float]
    best_parameters: float | None
    best_tokens: float | None
    best_loss: float | None
    inside: bool
    interval: Interval | None  # of the best parameters; None with three runs, which a parabola always meets

    def loss_at(self, parameters: Floats) -> Floats:
        """The parabola's losses."""
        log_N = np.log(parameters / self.centre)
        loss: Floats = self.terms[0] + self.terms[1] * log_N + self.terms[2] * log_N**2
        return loss


@dataclass(frozen=True)
class OptimumGrowth:
    """``best N = C^exponent`` over the levels of one mean depth, from minima inside the sizes measured."""

    mean_loops: int
    levels: int
    exponent: float
    interval: Interval | None


def fit_parabolas(
    runs: Runs, resamples: int, level: float, generator: np.random.Generator
) -> tuple[list[Parabola], list[OptimumGrowth]]:
    """Every level and depth with enough sizes, and how the best size grows with the level."""
    groups: dict[tuple[int, float], list[int]] = {}
    for place, row in enumerate(runs.rows):
        if row.flops_level is not None:
            groups.setdefault((row.mean_loops, row.flops_level), []).append(place)
    parabolas, samples = [], []
    for (loops, flops), places in sorted(groups.items()):
        if distinct(runs.points.unique[places]) < LEAST_SIZES:
            continue
        parabola, drawn = _fit_level(runs, loops, flops, places, resamples, level, generator)
        parabolas.append(parabola)
        samples.append(drawn)
    growth = []
    for loops in sorted({parabola.mean_loops for parabola in parabolas}):
        mine = [index for index, each in enumerate(parabolas) if each.mean_loops == loops and each.inside]
        if len(mine) >= 2:
            growth.append(_grow([parabolas[index] for index in mine], [samples[index] for index in mine], level))
    return parabolas, growth


def _fit_level(
    runs: Runs,
    loops: int,
    flops: float,
    places: list[int],
    resamples: int,
    level: float,
    generator: np.random.Generator,
) -> tuple[Parabola, list[float]]:
    """The parabola of one level, and the best parameters of its resamples (nan where there is no minimum)."""
    parameters, loss, tokens = runs.points.unique[places], runs.loss[places], runs.points.tokens[places]
    centre = float(np.exp(np.log(parameters).mean()))
    log_N = np.log(parameters / centre)
    terms = _parabola(log_N, loss)
    best = _minimum(terms)
    inside = best is not None and bool(log_N.min() < best < log_N.max())
    samples: list[float] = []
    if inside and len(places) > LEAST_SIZES:
        draws = draw_runs(
            len(places),
            resamples,
            lambda drawn: None if distinct(parameters[drawn]) >= LEAST_SIZES else "fewer than three sizes",
            generator,
        )
        for weights in [] if isinstance(draws, str) else draws:
            lowest = _minimum(_parabola(log_N, loss, weights))
            samples.append(np.nan if lowest is None else centre * float(np.exp(np.clip(lowest, -20, 20))))
    found = [value for value in samples if np.isfinite(value)]
    best_tokens = best_loss = None
    if best is not None:
        order = np.argsort(log_N, kind="stable")
        best_tokens = float(np.exp(np.interp(best, log_N[order], np.log(tokens[order])))) if inside else None
        best_loss = float(np.polynomial.polynomial.polyval(best, terms))
    parabola = Parabola(
        flops_level=flops,
        mean_loops=loops,
        runs=tuple(places),
        centre=centre,
        terms=(float(terms[0]), float(terms[1]), float(terms[2])),
        best_parameters=None if best is None else centre * float(np.exp(np.clip(best, -20, 20))),
        best_tokens=best_tokens,
        best_loss=best_loss,
        inside=inside,
        interval=interval_of(found, level),
    )
    return parabola, samples


def _parabola(log_N: Floats, loss: Floats, weights: Floats | None = None) -> Floats:
    """``c0, c1, c2`` of least squares."""
    spread = None if weights is None else np.sqrt(weights)
    return np.asarray(np.polynomial.polynomial.polyfit(log_N, loss, 2, w=spread), dtype=np.float64)


def _minimum(terms: Floats) -> float | None:
    """Where ``c0 + c1 u + c2 u^2`` is least; None when it opens downwards."""
    return None if terms[2] <= 0 else float(-terms[1] / (2 * terms[2]))


def _grow(parabolas: Sequence[Parabola], samples: Sequence[list[float]], level: float) -> OptimumGrowth:
    log_C = np.log([parabola.flops_level for parabola in parabolas])

    def exponent(best: Sequence[float | None]) -> float:
        return float(np.polyfit(log_C, np.log(np.array(best, dtype=np.float64)), 1)[0])

    drawn = [exponent(best) for best in zip(*samples, strict=False) if np.isfinite(best).all()]
    return OptimumGrowth(
        parabolas[0].mean_loops,
        len(parabolas),
        exponent([parabola.best_parameters for parabola in parabolas]),
        interval_of(drawn, level),
    )
