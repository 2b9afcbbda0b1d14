"""Who moves rows between tokens and experts: torch's indexing, or the engine's Triton kernels.

    dispatch   rows[r] = x[token of r]                      gradient: each token's K rows, added up
    collect    choices[n] = rows[row of n]                  gradient: each row to its place, zeros where none belongs
    combine    y[n] = sum_k gates[n, k] rows[row of n, k]   gradients: of the rows, and of the gates

Torch makes an (N, K, D) copy of the rows, the same again in fp32, and adds it up; DeepSpeed's kernels for AutoEP
(``deepspeed/moe/ep_kernels.py``, ``ops/triton_ops/autoep_fused_token_ops.py``) read each row where it lies and write
each result once. They are launched here from functions of our own, because AutoEP's leave the gradient of rows that no
choice fills undefined, and with groups padded to the grouped product's alignment such rows reach the weights' gradient.

Sums are in fp32 and in the order of the choices either way. The kernels need CUDA and Triton, which CUDA builds of
torch bring; :func:`choose_moves` says what it found.

Shapes: N tokens, K choices a token, D width, R rows.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from deepspeed.moe import ep_kernels
from deepspeed.ops.triton_ops import autoep_fused_token_ops as fused
from torch import Tensor

from launch.settings import BadInputError
from model.moe import DispatchPlan, collect, dispatch, mix

MovesName = Literal["auto", "torch", "triton"]


class RowMoves(Protocol):
    """The three moves; see the module's docstring."""

    def dispatch(self, x_ND: Tensor, plan: DispatchPlan) -> Tensor:
        """Tokens to rows sorted by expert, (R, D)."""

    def collect(self, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """The row of each choice where each token has one, (N, D)."""

    def combine(self, rows_RD: Tensor, plan: DispatchPlan, gates_NK: Tensor) -> Tensor:
        """Each token's gated sum, (N, D) in the dtype of the rows."""


class TorchMoves:
    """By indexing, as in the plain model."""

    def dispatch(self, x_ND: Tensor, plan: DispatchPlan) -> Tensor:
        """See :class:`RowMoves`."""
        return dispatch(x_ND, plan)

    def collect(self, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """See :class:`RowMoves`."""
        return collect(rows_RD, plan)

    def combine(self, rows_RD: Tensor, plan: DispatchPlan, gates_NK: Tensor) -> Tensor:
        """See :class:`RowMoves`."""
        return mix(rows_RD, plan, gates_NK)


class TritonMoves:
    """By the engine's kernels."""

    def dispatch(self, x_ND: Tensor, plan: DispatchPlan) -> Tensor:
        """See :class:`RowMoves`."""
        rows_RD: Tensor = _Dispatch.apply(x_ND, plan.token_of_row_R, plan.row_of_choice_NK)
        return rows_RD

    def collect(self, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        """See :class:`RowMoves`."""
        x_ND: Tensor = _Collect.apply(rows_RD, plan.row_of_choice_NK)
        return x_ND

    def combine(self, rows_RD: Tensor, plan: DispatchPlan, gates_NK: Tensor) -> Tensor:
        """See :class:`RowMoves`."""
        y_ND: Tensor = _Combine.apply(rows_RD, gates_NK, plan.row_of_choice_NK)
        return y_ND


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_of_row_R: Tensor, row_of_choice_NK: Tensor) -> Any:
        ctx.save_for_backward(row_of_choice_NK)
        return ep_kernels.gather_rows(x_ND, token_of_row_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (row_of_choice_NK,) = ctx.saved_tensors
        if row_of_choice_NK.shape[1] == 1:
            return ep_kernels.gather_rows(grads[0], row_of_choice_NK.flatten()), None, None
        ones_NK = torch.ones(row_of_choice_NK.shape, dtype=torch.float32, device=grads[0].device)
        return _weighted_sum(grads[0], row_of_choice_NK, ones_NK), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, row_of_choice_N1: Tensor) -> Any:
        assert row_of_choice_N1.shape[1] == 1, row_of_choice_N1.shape
        ctx.save_for_backward(row_of_choice_N1)
        ctx.n_rows = rows_RD.shape[0]
        return ep_kernels.gather_rows(rows_RD, row_of_choice_N1.flatten())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (row_of_choice_N1,) = ctx.saved_tensors
        places = torch.arange(row_of_choice_N1.shape[0], device=row_of_choice_N1.device)
        # The kernel writes zeros where the index is negative: a row that no choice fills.
        place_of_row_R = places.new_full((ctx.n_rows,), -1).scatter_(0, row_of_choice_N1.flatten(), places)
        return ep_kernels.gather_rows(grads[0], place_of_row_R), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, gates_NK: Tensor, row_of_choice_NK: Tensor) -> Any:
        ctx.save_for_backward(rows_RD, gates_NK, row_of_choice_NK)
        return _weighted_sum(rows_RD, row_of_choice_NK, gates_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rows_RD, gates_NK, row_of_choice_NK = ctx.saved_tensors
        rows_RD, gates_NK, grad_ND = rows_RD.contiguous(), gates_NK.contiguous(), grads[0].contiguous()
        n_tokens, top_k = gates_NK.shape
        unfilled = rows_RD.shape[0] > row_of_choice_NK.numel()
        grad_rows_RD = torch.zeros_like(rows_RD) if unfilled else torch.empty_like(rows_RD)
        grad_gates_NK = torch.empty_like(gates_NK)
        if n_tokens:
            slots = fused._padded_top_k(top_k)
            fused._weighted_restore_backward_kernel[(n_tokens,)](
                grad_ND,
                rows_RD,
                row_of_choice_NK.contiguous(),
                gates_NK,
                grad_rows_RD,
                grad_gates_NK,
                rows_RD.shape[1],
                grad_ND.stride(0),
                rows_RD.stride(0),
                gates_NK.stride(0),
                grad_rows_RD.stride(0),
                grad_gates_NK.stride(0),
                TOP_K=top_k,
                K_PADDED=slots,
                BLOCK_H=fused._block_hidden(rows_RD.shape[1], slots=slots),
            )
        return grad_rows_RD, grad_gates_NK, None


def _weighted_sum(rows_RD: Tensor, row_of_choice_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """``y[n] = sum_k weights[n, k] rows[row_of_choice[n, k]]`` in fp32, rounded once."""
    rows_RD, weights_NK = rows_RD.contiguous(), weights_NK.contiguous()
    n_tokens, top_k = weights_NK.shape
    width = rows_RD.shape[1]
    y_ND = rows_RD.new_empty(n_tokens, width)
    if n_tokens:
        block = fused.triton.next_power_of_2(width)
        fused._weighted_restore_forward_kernel[(n_tokens,)](
            rows_RD,
            row_of_choice_NK.contiguous(),
            weights_NK,
            y_ND,
            width,
            rows_RD.stride(0),
            weights_NK.stride(0),
            y_ND.stride(0),
            TOP_K=top_k,
            BLOCK_H=min(fused._MAX_FORWARD_BLOCK_HIDDEN, max(16, block)),
            num_warps=4,
            enable_fp_fusion=False,  # a contracted product would not be rounded as torch's is
        )
    return y_ND


class MovesChoice(NamedTuple):
    """Who moves the rows, and why."""

    moves: RowMoves
    reason: str


def choose_moves(name: MovesName, device_type: str) -> MovesChoice:
    """What ``parallel.row_moves`` means on this machine.

    Raises:
        BadInputError: ``triton`` was asked for and cannot be had.
    """
    missing = None
    if device_type != "cuda":
        missing = f"{device_type} has no Triton kernels"
    elif not fused.is_available():
        missing = "DeepSpeed sees no Triton (CUDA builds of torch bring it: pip install triton)"
    if name == "triton" and missing:
        raise BadInputError(f'parallel.row_moves = "triton": {missing}; use "auto" or "torch"')
    if name == "torch" or missing:
        return MovesChoice(torch_moves, "torch's indexing: " + ("asked for" if name == "torch" else f"{missing}"))
    return MovesChoice(TritonMoves(), "DeepSpeed's Triton kernels")


torch_moves = TorchMoves()
