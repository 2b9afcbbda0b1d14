r"""How sure a fit is: the same fit to data that might as well have been measured.

    runs      drawn from the runs, with replacement (Besiroglu et al. 2024): for laws over many runs
    errors    drawn from the law's own errors, widened by ``sqrt(N / (N - P))``, and added to its predictions: for
              series of so few points that most draws of points would leave none to fit

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


def draw_runs(
    runs: int, resamples: int, why_not: Callable[[NDArray[np.bool_]], str | None], generator: np.random.Generator
) -> list[Floats] | str:
    """How often each of ``runs`` is in a draw with replacement, for each of ``resamples`` draws.

    ``why_not`` says what is wrong with a draw, given who is in it; when most draws are wrong, that is the result.
    """
    draws: list[Floats] = []
    for _ in range(resamples):
        for _ in range(_MOST_DRAWS):
            weights_N = np.bincount(generator.integers(runs, size=runs), minlength=runs).astype(np.float64)
            reason = why_not(weights_N > 0)
            if reason is None:
                draws.append(weights_N)
                break
        else:
            return f"too few runs to draw from: {reason}"
    return draws


def residual_resamples(
    problem: Problem[PointsT], best: Fit, log_loss_N: Floats, resamples: int, generator: np.random.Generator
) -> list[Fit]:
    """The fits to the law's own predictions with drawn errors."""
    points, coefficients = len(log_loss_N), len(best.x_P)
    predicted_N = problem.law.log_loss(best.x_P, problem.points)
    errors_N = (log_loss_N - predicted_N) * np.sqrt(points / (points - coefficients))
    weights_N = np.ones(points)
    return [
        problem.resolve(predicted_N + generator.choice(errors_N, size=points), weights_N, best, starts=0)
        for _ in range(resamples)
    ]
