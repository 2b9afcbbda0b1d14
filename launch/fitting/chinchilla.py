r"""Loss from parameters and tokens: ``L(N, D) = E + A N^-alpha + B D^-beta``.

Hoffmann et al. 2022, *Training Compute-Optimal Large Language Models*, section 3.3. N counts every parameter once,
however often it loops: over runs of several depths this law says what is lost by not looking at depth. With training
FLOPs of ``6 N D`` the best split of a budget C is ``N ~ C^a``, ``D ~ C^b`` with ``a = beta / (alpha + beta)`` and
``b = 1 - a``.

Coordinates: ``log E``, ``log A N0^-alpha``, alpha, ``log B D0^-beta``, beta, with N0 and D0 in the middle of the data.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from launch.fitting.huber import Law
from launch.fitting.runs import Floats, Points

EXPONENTS = (0.005, 4.0)
_SMALLEST_SHARE = math.exp(-7)  # of E in the least loss; below that the points show no E
_NARROWEST = 0.05  # spread of log D that log N must leave unexplained


class Chinchilla(Law[Points]):
    """The law, with its logs measured from the middle of ``points``."""

    title = "Chinchilla"
    equation = "L = E + A N^-alpha + B D^-beta"
    names: tuple[str, ...] = ("E", "A", "alpha", "B", "beta")

    def __init__(self, points: Points, loss_N: Floats) -> None:
        least, middle = float(loss_N.min()), float(np.median(loss_N))
        self._least, self._middle = least, middle
        self.log_N0, self.log_D0 = self._middle_of(points), float(np.log(points.tokens).mean())
        term = (math.log(middle) - 14, math.log(middle) + 5)
        irreducible = (math.log(least) + math.log(_SMALLEST_SHARE), math.log(least))
        self.bounds = (irreducible, term, EXPONENTS, term, EXPONENTS)

    def _middle_of(self, points: Points) -> float:
        return float(np.log(points.unique).mean())

    def log_parameters(self, x_P: Floats, points: Points) -> Floats:
        """Log of the parameters that count, N."""
        return np.log(points.unique)

    def _terms(self, x_P: Floats, points: Points) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Log loss, the shares of the three terms in the loss, and the two logs measured from the middle."""
        e, a, alpha, b, beta = x_P[:5]
        log_N = self.log_parameters(x_P, points) - self.log_N0
        log_D = np.log(points.tokens) - self.log_D0
        of_N, of_D = np.exp(a - alpha * log_N), np.exp(b - beta * log_D)
        total = math.exp(e) + of_N + of_D
        return np.log(total), of_N / total, of_D / total, log_N, log_D

    def log_loss(self, x_P: Floats, points: Points) -> Floats:
        """Log of the predicted losses."""
        return self._terms(x_P, points)[0]

    def gradient(self, x_P: Floats, points: Points) -> tuple[Floats, Floats]:
        """The same, and its derivatives."""
        log_loss, share_N, share_D, log_N, log_D = self._terms(x_P, points)
        columns = [1 - share_N - share_D, share_N, -share_N * log_N, share_D, -share_D * log_D]
        return log_loss, np.stack(columns, axis=-1)

    def grid(self) -> Floats:
        """E as a share of the least loss, the rest of the middle one split between the two terms, and exponents."""
        rows = []
        for part, split, alpha, beta in itertools.product(
            (0.3, 0.6, 0.8, 0.95), (0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.3, 0.6, 1.2), (0.1, 0.3, 0.6, 1.2)
        ):
            rest = self._middle - part * self._least
            rows.append(
                [math.log(part * self._least), math.log(split * rest), alpha, math.log((1 - split) * rest), beta]
            )
        return np.array(rows)

    def coefficients(self, x_P: Floats) -> dict[str, float]:
        """E, A, alpha, B, beta."""
        e, a, alpha, b, beta = (float(value) for value in x_P[:5])
        return {
            "E": math.exp(e),
            "A": math.exp(min(a + alpha * self.log_N0, 700)),
            "alpha": alpha,
            "B": math.exp(min(b + beta * self.log_D0, 700)),
            "beta": beta,
        }


def why_not_chinchilla(points: Points) -> str | None:
    """What keeps five coefficients from being told apart by ``points``; None when nothing does."""
    needed = len(Chinchilla.names) + 1
    if len(points.tokens) < needed:
        return f"{len(points.tokens)} runs; it has {needed - 1} coefficients and needs {needed} runs or more"
    for name, values in (("parameters", points.unique), ("tokens", points.tokens)):
        different = distinct(values)
        if different < 3:
            return f"{different} different number{'s' * (different > 1)} of {name}; it needs 3 or more"
    log_N, log_D = np.log(points.unique), np.log(points.tokens)
    slope = np.polynomial.Polynomial.fit(log_N, log_D, 1)
    if float(np.std(log_D - slope(log_N))) < _NARROWEST:
        return (
            "the tokens are a power of the parameters in all runs (one FLOP level, or a fixed number of tokens a "
            "parameter), so the two terms cannot be told apart; add runs off that line"
        )
    return None


def distinct(values: Floats) -> int:
    """How many values differ by more than 1%."""
    ordered = np.sort(np.log(values))
    return 1 + int((np.diff(ordered) > 0.01).sum())
