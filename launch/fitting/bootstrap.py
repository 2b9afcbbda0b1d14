r"""How sure a fit is: the same fit to data that might as well have been measured.

    runs      drawn from the runs, with replacement (Besiroglu et al. 2024): for laws over many runs
    errors    drawn from the law's own errors, widened by ``sqrt(N / (N - P))``, and added to its predictions: for series
              of so few points that most draws of points would leave none to fit

The interval is that of percentiles. A draw from which the law's coefficients cannot be told apart (few sizes, say) is
drawn again: it says nothing about them. Resampling knows what the runs show: no other seed than theirs, no error that
all of them share, and nothing about a law that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from launch.fitting.huber import Fit, Problem
from launch.fitting.runs import Floats
from launch.settings import BadInputError

_STARTS = 2  # of the grid, beside the fit to the measured losses
_MOST_DRAWS = 50  # for one that can be fitted

PointsT = TypeVar("PointsT")


@dataclass(frozen=True)
class Interval:
    """Percentiles of the resampled values."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies inside."""
        return self.low <= value <= self.high


def interval_of(values: Sequence[float], level: float) -> Interval | None:
    """The middle ``level`` of ``values``; None without any."""
    if not values:
        return None
    low, high = np.quantile(np.array(values), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def draw_runs(runs: int, why_not: Callable[[NDArray[np.bool_]], str | None], generator: np.random.Generator) -> Floats:
    """How often each of ``runs`` is in a draw with replacement that ``why_not`` (of those in it) has nothing against.

    Raises ``BadInputError`` when such a draw does not come.
    """
    reason: str | None = None
    for _ in range(_MOST_DRAWS):
        weights_N = np.bincount(generator.integers(runs, size=runs), minlength=runs).astype(np.float64)
        reason = why_not(weights_N > 0)
        if reason is None:
            return weights_N
    raise BadInputError(f"--resamples: too few runs to draw from: {reason}; add runs, or ask for --resamples 0")


def run_resamples(problem: Problem[PointsT], best: Fit, log_loss_N: Floats, draws_SN: Sequence[Floats]) -> list[Fit]:
    """The fits to drawn runs."""
    return [problem.solve(log_loss_N, weights_N, _STARTS, best.x_P) for weights_N in draws_SN]


def residual_resamples(
    problem: Problem[PointsT], best: Fit, log_loss_N: Floats, resamples: int, generator: np.random.Generator
) -> list[Fit]:
    """The fits to the law's own predictions with drawn errors."""
    points, coefficients = len(log_loss_N), len(best.x_P)
    predicted_N = problem.law.log_loss(best.x_P, problem.points)
    errors_N = (log_loss_N - predicted_N) * np.sqrt(points / (points - coefficients))
    weights_N = np.ones(points)
    return [
        problem.solve(predicted_N + generator.choice(errors_N, size=points), weights_N, _STARTS, best.x_P)
        for _ in range(resamples)
    ]
