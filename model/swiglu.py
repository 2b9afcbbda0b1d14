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
    product: torch.Tensor = _Packed.apply(gate_up)
    return product


def swiglu_of(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The same of two tensors (..., F), for layers whose projections are apart."""
    product: torch.Tensor = _Apart.apply(gate, up)
    return product


def _write_gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, grad_gate: torch.Tensor, grad_up: torch.Tensor
) -> None:
    torch.mul(F.silu(gate), grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        _write_gradients(grads[0], *gate_up.chunk(2, dim=-1), *grad_gate_up.chunk(2, dim=-1))
        return grad_gate_up


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _write_gradients(grads[0], gate, up, grad_gate, grad_up)
        return grad_gate, grad_up


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
