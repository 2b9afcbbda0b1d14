r"""Whether probabilities mean what they say: how far off they are, and the two numbers that mend them.

    Brier = mean (p - y)^2
    ECE   = sum over bins of |mean p - mean y| * share of the bin              bins of equal width (Guo et al. 2017)
    p'    = sigmoid(scale * z + shift)                                         Platt 1999, fitted on held-out logits z

``scale`` and ``shift`` minimise the cross-entropy of p', a convex problem in two unknowns solved by Newton's method in
float64. They are a report on a trained verifier and a setting of who uses its scores, never part of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BINS = 15
_STEPS = 50
# Where all outcomes agree the best scale is infinite; a small pull towards (1, 0) keeps it finite.
_RIDGE = 1e-3


class Calibration(NamedTuple):
    """``p' = sigmoid(scale * logit + shift)``."""

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities of ``logits``, fp32, any shape."""
        return torch.sigmoid(self.scale * logits.float() + self.shift)


def brier_score(probabilities: torch.Tensor, outcomes: torch.Tensor) -> float:
    """Mean squared distance between probabilities (N,) and outcomes (N,), 0 or 1."""
    return float((probabilities.double() - outcomes.double()).square().mean())


def expected_calibration_error(probabilities: torch.Tensor, outcomes: torch.Tensor, bins: int = BINS) -> float:
    """Mean over samples of the distance between stated and actual frequency in the sample's bin."""
    bin_N = (probabilities.double() * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_N, probabilities.double() - outcomes.double())
    return float(gaps.abs().sum() / len(bin_N))


def fit_calibration(logits: torch.Tensor, outcomes: torch.Tensor) -> Calibration:
    """Scale and shift for logits (N,) by their outcomes (N,), 0 or 1.

    Raises:
        ValueError: Without a sample.
    """
    if not len(logits):
        raise ValueError("logits: none; a calibration needs held-out samples")
    features_N2 = torch.stack((logits.double(), torch.ones_like(logits, dtype=torch.float64)), dim=1)
    wanted_N, start_2 = outcomes.double(), torch.tensor([1.0, 0.0], dtype=torch.float64)
    ridge_22 = _RIDGE * torch.eye(2, dtype=torch.float64)

    def objective(values_2: torch.Tensor) -> torch.Tensor:
        z_N = features_N2 @ values_2
        pull = 0.5 * _RIDGE * (values_2 - start_2).square().sum()
        return torch.nn.functional.softplus(z_N).sub(wanted_N * z_N).mean() + pull

    values_2 = start_2
    for _ in range(_STEPS):
        p_N = torch.sigmoid(features_N2 @ values_2)
        gradient_2 = features_N2.T @ (p_N - wanted_N) / len(p_N) + _RIDGE * (values_2 - start_2)
        curvature_22 = features_N2.T @ (features_N2 * (p_N * (1 - p_N)).unsqueeze(1)) / len(p_N) + ridge_22
        step_2 = torch.linalg.solve(curvature_22, gradient_2)
        size = 1.0  # halved until the step descends: far from the minimum a whole Newton step may not
        while objective(values_2 - size * step_2) > objective(values_2) and size > 1e-6:
            size /= 2
        values_2 = values_2 - size * step_2
        if float(step_2.abs().max()) < 1e-10:
            break
    return Calibration(*values_2.tolist())
