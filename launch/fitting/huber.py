r"""How a law is fitted: least Huber loss of log losses, from many starts, to convergence.

    minimise over x:   sum_i w_i huber_delta(log L_x(point_i) - log L_i)

Hoffmann et al. 2022 (*Training Compute-Optimal Large Language Models*, approach 3, equation 3): the log makes errors
relative, and beyond ``delta`` = 1e-3 an error counts linearly, so that a diverged run does not decide. The logs of
coefficients are fitted, which keeps them positive.

Besiroglu et al. 2024 (*Chinchilla Scaling: A replication attempt*): that paper's optimizer stopped early, because its
objective was a mean, and so small that every step looked like the last. Here the objective is a sum in units of
``delta^2``, every law measures its logs from the middle of the data (otherwise ``A`` and ``alpha`` are almost one
coefficient), derivatives are exact, L-BFGS-B is started again until it gains nothing, and a fit says whether it
converged: whether the pulls of the points cancel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from scipy.optimize import minimize

from launch.fitting.runs import Floats

DELTA = 1e-3  # of log losses: errors beyond 0.1% count linearly
STARTS = 12  # of the grid, the best ones, that are followed to their ends
RESTARTED = 1  # the same, where the solution to much the same problem is known
BALANCED = 1e-3  # the pulls of the points on a coefficient cancel to this share of their sizes
_AT_BOUND = 1e-6
_RESTARTS = 8
_LEAST_GAIN = 1e-9  # relative, of a restart

PointsT = TypeVar("PointsT")


class Law(ABC, Generic[PointsT]):
    """A parametric law of losses. It is fitted in coordinates ``x`` of its own, in which that is easy.

    P coordinates, N points. ``names`` are those of the coefficients that people know, as many.
    """

    title: str
    equation: str
    names: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]  # of each coordinate

    @abstractmethod
    def log_loss(self, x_P: Floats, points: PointsT) -> Floats:
        """Log of the predicted losses, N."""

    @abstractmethod
    def gradient(self, x_P: Floats, points: PointsT) -> tuple[Floats, Floats]:
        """The same, and its derivatives, N x P."""

    @abstractmethod
    def grid(self) -> Floats:
        """Starts that cover what is plausible, G x P."""

    @abstractmethod
    def coefficients(self, x_P: Floats) -> dict[str, float]:
        """``x`` as the law is written, by ``names``."""


@dataclass(frozen=True)
class Fit:
    """A fitted law, in its own coordinates."""

    x_P: Floats
    objective: float  # in units of delta^2
    converged: bool
    at_bounds: tuple[int, ...]  # coordinates that a bound stopped


class Problem(Generic[PointsT]):
    """A law and points; solved for the measured losses, and for what a bootstrap makes of them."""

    def __init__(self, law: Law[PointsT], points: PointsT, delta: float = DELTA) -> None:
        self.law, self.points, self._delta = law, points, delta
        lower, upper = np.array(law.bounds).T
        self._grid_GP = np.clip(law.grid(), lower, upper)
        self._grid_log_loss_GN = np.stack([law.log_loss(x_P, points) for x_P in self._grid_GP])

    def solve(self, log_loss_N: Floats, weights_N: Floats, starts: int = STARTS, near_P: Floats | None = None) -> Fit:
        """The best of the ends reached from the ``starts`` best points of the grid, and from ``near_P``."""
        costs_G = self._costs(self._grid_log_loss_GN - log_loss_N) @ weights_N
        chosen = [self._grid_GP[index] for index in np.argsort(costs_G, kind="stable")[:starts]]
        if near_P is not None:
            chosen.insert(0, near_P)
        ends = [self._descend(x_P, log_loss_N, weights_N) for x_P in chosen]
        return min(ends, key=lambda end: end.objective)

    def resolve(self, log_loss_N: Floats, weights_N: Floats, known: Fit, starts: int = RESTARTED) -> Fit:
        """``solve`` for losses or weights close to those of which ``known`` is the solution: fewer starts do."""
        return self.solve(log_loss_N, weights_N, starts, known.x_P)

    def _costs(self, errors: Floats) -> Floats:
        size = np.abs(errors) / self._delta
        costs: Floats = np.where(size <= 1, size * size / 2, size - 0.5)
        return costs

    def _descend(self, start_P: Floats, log_loss_N: Floats, weights_N: Floats) -> Fit:
        law, points, delta = self.law, self.points, self._delta

        def objective(x_P: Floats) -> tuple[float, Floats]:
            predicted_N, slope_NP = law.gradient(x_P, points)
            errors_N = predicted_N - log_loss_N
            pull_N = weights_N * np.clip(errors_N / delta, -1, 1) / delta
            return float(weights_N @ self._costs(errors_N)), pull_N @ slope_NP

        x_P, best = start_P, np.inf
        for _ in range(_RESTARTS):
            end: Any = minimize(
                objective,
                x_P,
                jac=True,
                method="L-BFGS-B",
                bounds=law.bounds,
                options={"maxiter": 1000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8, "maxcor": 20},
            )
            gained = best - end.fun
            if end.fun < best:
                x_P, best = end.x, float(end.fun)
            if gained <= _LEAST_GAIN * max(best, 1.0):
                break
        return self._judged(x_P, best, log_loss_N, weights_N)

    def _judged(self, x_P: Floats, objective: float, log_loss_N: Floats, weights_N: Floats) -> Fit:
        predicted_N, slope_NP = self.law.gradient(x_P, self.points)
        pull_NP = (weights_N * np.clip((predicted_N - log_loss_N) / self._delta, -1, 1))[:, None] * slope_NP
        lower, upper = np.array(self.law.bounds).T
        span = upper - lower
        low, high = x_P - lower <= _AT_BOUND * span, upper - x_P <= _AT_BOUND * span
        # A bound may hold a coordinate against the pull towards it, and only against that.
        total_P = pull_NP.sum(axis=0)
        held = (low & (total_P > 0)) | (high & (total_P < 0))
        # Errors much below delta pull hardly at all; what they cancel to does not matter then.
        sizes_P = np.abs(pull_NP).sum(axis=0) + BALANCED * (weights_N @ np.abs(slope_NP))
        balanced = held | (np.abs(total_P) <= BALANCED * sizes_P)
        return Fit(x_P, objective, bool(balanced.all()), tuple(int(index) for index in np.flatnonzero(low | high)))
