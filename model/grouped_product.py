r"""Grouped matrix products: one matrix an expert, each applied to that expert's run of rows.

    out[r] = W_i rows[r]   for r in offsets[i-1] : offsets[i]

The rows of all experts lie one expert after the other, so that the whole layer is ONE call. Who does it, and how, is a
:class:`GroupedProduct`; the experts hold one as their attribute ``product`` and know nothing else of it:

    grouped_mm   ``torch._grouped_mm``: a grouped kernel on GPUs, a loop in C++ on CPUs
    loop         one ordinary product an expert, in Python: what the others are measured against
    megablocks   block-sparse kernels, optional: ``model/megablocks.py``

Rows past the last offset exist where group sizes are padded: what is written there is unspecified, and nothing flows
back.

Shapes: R rows sorted by expert, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.gradient_sum import GradientSum, gradient_sum_of


class GroupedProduct(Protocol):
    """Applies each expert's matrix to its rows."""

    row_alignment: int
    """Group sizes must be multiples of it, beyond what the device asks for (``model.moe.row_alignment``)."""

    def __call__(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """The products, (R, O).

        Args:
            rows_RI: Expert i owns rows ``offsets[i - 1] : offsets[i]``.
            weight_EOI: One matrix an expert, laid out as ``nn.Linear`` does.
            offsets_E: int32, the end of each expert's rows, on the device of the rows.
        """


class Kernel(Protocol):
    """The three products of one grouped product and its gradients, each without a graph."""

    def multiply(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """(R, O)."""

    def rows_gradient(self, grad_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """``grad[rows of i] W_i``, (R, I)."""

    def add_weight_gradient(
        self, grad_RO: Tensor, rows_RI: Tensor, offsets_E: Tensor, sum_EOI: Tensor, fresh: bool
    ) -> None:
        """``sum[i] += grad[rows of i]^T rows[rows of i]``; what a ``fresh`` sum holds is undefined and overwritten."""


def differentiable_product(kernel: Kernel, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
    """``kernel.multiply`` with a graph; the weight's gradient goes into its sum when a loop has one for it."""
    gradient_sum = gradient_sum_of(weight_EOI)
    token = None if gradient_sum is None else gradient_sum.token
    product: Tensor = _Product.apply(kernel, rows_RI, weight_EOI, offsets_E, gradient_sum, token)
    return product


class _Product(torch.autograd.Function):
    """Saves the weight itself rather than a view of it: ZeRO-3 frees and gathers what a parameter holds, not a view."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        rows_RI: Tensor,
        weight_EOI: Tensor,
        offsets_E: Tensor,
        gradient_sum: GradientSum | None,
        token: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_EOI, offsets_E)
        ctx.kernel, ctx.gradient_sum = kernel, gradient_sum
        return kernel.multiply(rows_RI, weight_EOI, offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        rows_RI, weight_EOI, offsets_E = ctx.saved_tensors
        grad_RO = grads[0].contiguous()
        grad_rows = ctx.kernel.rows_gradient(grad_RO, weight_EOI, offsets_E) if ctx.needs_input_grad[1] else None
        grad_weight = None
        if ctx.needs_input_grad[2]:
            grad_weight = weight_gradient(grad_RO, rows_RI, weight_EOI, offsets_E, ctx.gradient_sum, ctx.kernel)
        return None, grad_rows, grad_weight, None, None, None


def weight_gradient(
    grad_RO: Tensor,
    rows_RI: Tensor,
    weight_EOI: Tensor,
    offsets_E: Tensor,
    gradient_sum: GradientSum | None,
    kernel: Kernel | None = None,
) -> Tensor | None:
    """The gradient of ``weight``, (E, O, I), by ``kernel`` (:class:`GroupedMM`); None: ``gradient_sum`` took it in."""
    add = partial((kernel or grouped_mm).add_weight_gradient, grad_RO, rows_RI, offsets_E)
    if gradient_sum is not None:
        gradient_sum.add(add, like=grad_RO)
        return None
    gradient_EOI = grad_RO.new_empty(weight_EOI.shape)
    add(gradient_EOI, True)
    return gradient_EOI


class GroupedMM:
    """``torch._grouped_mm``: no host synchronisation on GPUs."""

    row_alignment = 1

    def __call__(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`GroupedProduct`."""
        return differentiable_product(self, rows_RI, weight_EOI, offsets_E)

    def multiply(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        return torch._grouped_mm(rows_RI, weight_EOI.transpose(-2, -1), offs=offsets_E)

    def rows_gradient(self, grad_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`Kernel`."""
        return torch._grouped_mm(grad_RO, weight_EOI, offs=offsets_E)

    def add_weight_gradient(
        self, grad_RO: Tensor, rows_RI: Tensor, offsets_E: Tensor, sum_EOI: Tensor, fresh: bool
    ) -> None:
        """See :class:`Kernel`; on CPUs each expert's product is added where it belongs, elsewhere all in one kernel."""
        if not rows_RI.is_cpu:
            # Reading the offsets would make the host wait.
            gradient_EOI = torch._grouped_mm(grad_RO.t(), rows_RI, offs=offsets_E)
            sum_EOI.copy_(gradient_EOI) if fresh else sum_EOI.add_(gradient_EOI)
            return
        start = 0
        for sum_OI, end in zip(sum_EOI.unbind(0), offsets_E.tolist(), strict=True):
            if end > start:
                torch.addmm(sum_OI, grad_RO[start:end].t(), rows_RI[start:end], beta=0 if fresh else 1, out=sum_OI)
            elif fresh:
                sum_OI.zero_()
            start = end


class ExpertLoop:
    """One product an expert. Reads the offsets on the host."""

    row_alignment = 1

    def __call__(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`GroupedProduct`; rows past the last offset come out as zeros."""
        ends = offsets_E.tolist()
        sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        # split and unbind have one gradient; indexing would make a whole tensor of zeros for each expert.
        *groups, padding = rows_RI.split([*sizes, rows_RI.shape[0] - ends[-1]])
        outputs = [rows @ weight_OI.T for rows, weight_OI in zip(groups, weight_EOI.unbind(0), strict=True)]
        return torch.cat((*outputs, padding.new_zeros(padding.shape[0], weight_EOI.shape[1])))


def expert_weights(module: nn.Module) -> list[nn.Parameter]:
    """The stacked weights of every experts module below ``module``: those that a :class:`GroupedProduct` multiplies."""
    return [weight for m in module.modules() if hasattr(m, "product") for weight in m.parameters(recurse=False)]


grouped_mm = GroupedMM()
loop = ExpertLoop()
