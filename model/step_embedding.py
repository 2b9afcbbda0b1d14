"""Loop-step embedding: tells the shared block which loop it is in, for any t.

    step(t) = gain * [sin(t w), cos(t w)],   w_i = 1000^(-2i/D)

Sinusoids rather than a table, so that depths beyond the trained T have a value (bounded, continuing the same waves).
"""

from __future__ import annotations

import torch
from torch import nn

_LONGEST_PERIOD = 1000.0  # in units of 2 pi loops; far beyond any depth in use
_INITIAL_GAIN = 0.02  # against the unit variance of the normalised state


class LoopStepEmbedding(nn.Module):
    """One learned gain per channel; no table, no limit on t."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), _INITIAL_GAIN))

    def forward(self, loop: int) -> torch.Tensor:
        """(D,) fp32 for loop ``loop``, counted from 0."""
        half = self.gain.shape[0] // 2
        exponents = torch.arange(half, dtype=torch.float32, device=self.gain.device) / half
        angles = loop * _LONGEST_PERIOD**-exponents
        return torch.cat((angles.sin(), angles.cos())) * self.gain.float()
