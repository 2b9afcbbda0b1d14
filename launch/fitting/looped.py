r"""Loss with loops: ``L(N, D, T) = E + A (N_once + T^phi N_rec)^-alpha + B D^-beta``.

Schwethelm et al. 2026, *How Much Is One Recurrence Worth? Iso-Depth Scaling Laws for Looped Language Models*. A core
of ``N_rec`` parameters that loops T times is worth ``T^phi N_rec`` parameters: phi = 1 would be as good as T cores of
their own, phi = 0 no better than one pass. A loop costs the training FLOPs of a core of its own, whatever phi is; so
phi < 1 says that at equal FLOPs more parameters win, and phi > 0 that at equal parameters more loops do.

Coordinates: Chinchilla's, and phi. With several MSRD scales T is the loops of the finest.
"""

from __future__ import annotations

import numpy as np

from launch.fitting.chinchilla import Chinchilla, distinct, why_not_chinchilla
from launch.fitting.runs import Floats, Points

PHI = (-1.0, 2.0)
_MIDDLE_PHI = 0.5
_NARROWEST_DEPTH = 0.05  # spread of log T that parameters and tokens must leave unexplained


class Looped(Chinchilla):
    """The law; Chinchilla's is the one with phi = 0."""

    title = "looped"
    equation = "L = E + A (N_once + T^phi N_rec)^-alpha + B D^-beta"
    names = (*Chinchilla.names, "phi")

    def __init__(self, points: Points, loss_N: Floats) -> None:
        super().__init__(points, loss_N)
        self.bounds = (*self.bounds, PHI)

    def _middle_of(self, points: Points) -> float:
        return float(np.log(points.once + points.loops**_MIDDLE_PHI * points.recurrent).mean())

    def log_parameters(self, x_P: Floats, points: Points) -> Floats:
        """Log of the effective parameters."""
        effective: Floats = points.once + points.loops ** x_P[5] * points.recurrent
        return np.log(effective)

    def gradient(self, x_P: Floats, points: Points) -> tuple[Floats, Floats]:
        """Log of the predicted losses, and its derivatives."""
        log_loss, share_N, share_D, log_N, log_D = self._terms(x_P, points)
        looped = points.loops ** x_P[5] * points.recurrent
        by_phi = looped * np.log(points.loops) / (points.once + looped)
        columns = [1 - share_N - share_D, share_N, -share_N * log_N, share_D, -share_D * log_D]
        return log_loss, np.stack([*columns, -share_N * x_P[2] * by_phi], axis=-1)

    def grid(self) -> Floats:
        """Chinchilla's, at several phi."""
        grid_GP = super().grid()
        return np.concatenate([np.column_stack([grid_GP, np.full(len(grid_GP), phi)]) for phi in (0.0, 0.4, 0.8)])

    def coefficients(self, x_P: Floats) -> dict[str, float]:
        """E, A, alpha, B, beta, phi."""
        return {**super().coefficients(x_P), "phi": float(x_P[5])}


def why_not_looped(points: Points) -> str | None:
    """What keeps six coefficients from being told apart by ``points``; None when nothing does."""
    reason = why_not_chinchilla(points)
    if reason is not None:
        return reason
    needed = len(Looped.names) + 1
    if len(points.tokens) < needed:
        return f"{len(points.tokens)} runs; it has {needed - 1} coefficients and needs {needed} runs or more"
    if distinct(points.loops) < 2:
        return f"all runs have {points.loops[0]:g} mean loops; it needs 2 depths or more"
    # The depth must vary beside the size: otherwise the core's worth and the size's are one.
    log_T, log_N, log_D = np.log(points.loops), np.log(points.unique), np.log(points.tokens)
    others = np.column_stack([np.ones_like(log_N), log_N, log_D])
    left = log_T - others @ np.linalg.lstsq(others, log_T, rcond=None)[0]
    if float(np.std(left)) < _NARROWEST_DEPTH:
        return "the depth follows from parameters and tokens in all runs; train one size at several depths"
    return None
