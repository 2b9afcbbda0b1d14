"""How well a law says what it has not seen: fitted without the largest runs, and asked for their losses.

A law with enough coefficients fits anything; what it is for is the next size up. Two questions, since a sweep extends
in two directions: the largest size (most parameters, each counted once), and the largest budget (most training FLOPs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from launch.fitting.chinchilla import Chinchilla
from launch.fitting.huber import Problem
from launch.fitting.runs import Points, Runs

Unseen = Literal["largest size", "largest budget"]
_SAME = 0.02  # runs of one size or budget differ by no more


@dataclass(frozen=True)
class HeldOut:
    """Relative errors of predicted losses, predicted over measured less one."""

    what: Unseen
    runs: int
    trained_on: int
    mean_error: float  # of absolute values
    bias: float  # the mean with its sign: above 0, the law expects worse losses than came
    worst_error: float


def largest(runs: Runs, what: Unseen) -> NDArray[np.bool_]:
    """Marks the runs of the largest size or budget."""
    values = runs.points.unique if what == "largest size" else runs.flops
    marked: NDArray[np.bool_] = values >= (1 - _SAME) * values.max()
    return marked


def predict_unseen(
    law: type[Chinchilla], why_not: Callable[[Points], str | None], runs: Runs, what: Unseen, delta: float
) -> HeldOut | str:
    """The error on the largest runs of a fit to the others, or why there is none."""
    unseen = largest(runs, what)
    seen = runs.where(~unseen)
    if not len(seen):
        return "all runs are as large"
    reason = why_not(seen.points)
    if reason is not None:
        return f"without them: {reason}"
    fitted = law(seen.points, seen.loss)
    fit = Problem(fitted, seen.points, delta).solve(np.log(seen.loss), np.ones(len(seen)))
    test = runs.where(unseen)
    errors = np.expm1(fitted.log_loss(fit.x_P, test.points) - np.log(test.loss))
    return HeldOut(
        what,
        runs=len(test),
        trained_on=len(seen),
        mean_error=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        worst_error=float(np.abs(errors).max()),
    )
