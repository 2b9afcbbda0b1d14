r"""Stable injection: the linear part of the loop, a diagonal system that always forgets.

    a = exp(log_A) > 0,  dt = exp(log_dt) > 0        continuous time: dh/dtau = -a h + gain * e, sampled every dt
    A = exp(-dt a)                                   exact zero-order hold
    B = (1 - A) / a * gain

(Parcae, Prairie et al. 2026, after S4's diagonal form.) Both exponents pass through a smooth squash into
(-2.4, 1.4), so ``dt a`` lies in (e^-4.8, e^2.8) and ``7e-8 < A < 0.992 < 1 - 2^-7`` for *every* parameter value,
infinite ones included; 1 - 2^-7 is a bf16 number, so rounding cannot pass it. Near 0 the squash is close to the
identity, and unlike clamping it never stops the gradient at an ordinary value. All of it in fp32.

rho(A) = max(A) < 1 bounds the linear part only. The block's update is bounded too (it reads a normalised state),
so states stay bounded at any depth; that the *whole* loop contracts is not implied and must be measured.
"""

from __future__ import annotations

import torch
from torch import nn

SPECTRAL_BOUND = 1 - 2**-7
_CENTRE, _RADIUS = -0.5, 1.9


def _squash(exponent: torch.Tensor) -> torch.Tensor:
    """Smoothly into (centre - radius, centre + radius), slope 1 at the centre."""
    return _CENTRE + _RADIUS * torch.tanh((exponent.float() - _CENTRE) / _RADIUS)


class StableInjection(nn.Module):
    """Per-channel decay A and drive B; at the start A is about 0.37 and the fixed point of the linear part is e."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_A = nn.Parameter(torch.zeros(dim))
        self.log_dt = nn.Parameter(torch.zeros(1))
        self.gain = nn.Parameter(torch.ones(dim))

    def decay(self) -> torch.Tensor:
        """A, (D,) fp32."""
        return torch.exp(-(_squash(self.log_A) + _squash(self.log_dt)).exp())

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, each (D,) fp32."""
        log_a = _squash(self.log_A)
        rate = (log_a + _squash(self.log_dt)).exp()
        # expm1 keeps 1 - A exact to rounding when the rate is small.
        return torch.exp(-rate), -torch.expm1(-rate) * (-log_a).exp() * self.gain.float()
