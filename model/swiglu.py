"""SwiGLU feed-forward (Shazeer 2020): ``W_down (silu(W_gate x) * W_up x)``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model.config import IceConfig
from model.init import Linear, output_std


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, (..., F), of (..., 2F) with the gate first.

    Keeps its input alone for the backward, and writes both gradients where they belong: autograd would keep
    ``silu(gate)`` as well and join the two halves by a copy.
    """
    product: torch.Tensor = _Activation.apply(gate_up)
    return product


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grads[0], out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad_gate_up


class SwiGLU(nn.Module):
    """Dense feed-forward; ``gate_up_proj`` holds the gate's rows, then the up rows, as the experts do."""

    def __init__(self, config: IceConfig, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.dim, 2 * hidden_dim)
        self.down_proj = Linear(hidden_dim, config.dim, init_std=output_std(config, hidden_dim))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        output: torch.Tensor = self.down_proj(swiglu(self.gate_up_proj(x_BSD)))
        return output
