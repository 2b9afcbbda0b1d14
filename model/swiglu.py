"""SwiGLU feed-forward (Shazeer 2020): ``W_down (silu(W_gate x) * W_up x)``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.config import IceConfig
from model.init import Linear, output_std


class SwiGLU(nn.Module):
    """Dense feed-forward; ``gate_up_proj`` holds the gate's rows, then the up rows, as the experts do."""

    def __init__(self, config: IceConfig, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.dim, 2 * hidden_dim)
        self.down_proj = Linear(hidden_dim, config.dim, init_std=output_std(config, hidden_dim))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        gate, up = self.gate_up_proj(x_BSD).chunk(2, dim=-1)
        output: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return output
