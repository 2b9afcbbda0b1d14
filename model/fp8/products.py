r"""Matrix products in FP8, dense and grouped, and their gradients.

    forward           y  = Q_x(x) Q_w(W)^T              both in e4m3, accumulated in fp32
    input gradient    dx = Q_g(dy) Q_v(W)               the same, e4m3 for gradients too: their range is in the scale
    weight gradient   dW = dy^T x                       in the run's dtype

Q rounds to e4m3 with a scale for each tile (``scaling.py``); gradients pass through it as if it were the identity. A
:class:`Recipe` says which tiles:

                    x             W, forward       dy            W, input gradient
    fp8_rowwise     a row         a row            a row         the matrix       torchao's ``rowwise_with_gw_hp``
    fp8_blockwise   1 x 128       128 x 128        1 x 128       128 x 128        DeepSeek-V3 (2024, section 3.3.2)

The weight gradient stays in high precision in both. DeepSeek-V3 takes it in FP8 too; here the same matrix collects the
gradients of T loops, whose rounding would add up in one place, and its contraction runs over tokens, so that scales
would span them: each expert's rows would have to be padded to 128 for it, and a rank without tokens would have a tile
of nothing. The price is that a third of the FLOPs does not get faster.

A product saves its input and *the parameter itself*, never a transposed or quantised copy: a saved view would keep
ZeRO-3's gathered storage alive from forward to backward, in every loop, where the parameter is given back at once and
gathered again when its gradient is due. The price is that weights are quantised again in the backward.

Who multiplies is a :class:`Kernels`: :class:`Emulated` here (eight-bit operands exactly, as numbers of the run's dtype,
multiplied in it), the GPU's in ``gpu_kernels.py``.

Shapes: R rows, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8.scaling import BLOCK_OF_128, ROW, ROW_OF_128, WHOLE, Tile, rounded
from model.grouped_product import GroupedMM


class Recipe(NamedTuple):
    """Which elements share a scale, in each operand."""

    name: str
    input: Tile
    weight: Tile
    gradient: Tile
    weight_in_gradient: Tile


ROWWISE = Recipe("fp8_rowwise", input=ROW, weight=ROW, gradient=ROW, weight_in_gradient=WHOLE)
BLOCKWISE = Recipe("fp8_blockwise", ROW_OF_128, BLOCK_OF_128, ROW_OF_128, BLOCK_OF_128)


class Kernels(Protocol):
    """Quantises and multiplies; all matrices come in the run's dtype, and so does the result."""

    row_alignment: int
    """What the size of each expert's group must be a multiple of."""

    def product(self, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        """``Q_x(x) Q_w(W)^T``, (R, O)."""

    def input_gradient(self, gradient_RO: Tensor, weight_OI: Tensor) -> Tensor:
        """``Q_g(dy) Q_v(W)``, (R, I)."""

    def grouped_product(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """The first, for each expert's rows, (R, O); unspecified past the last offset."""

    def grouped_input_gradient(self, gradient_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """The second, for each expert's rows, (R, I); unspecified past the last offset."""


class Emulated:
    """FP8's numerics without its speed, on any device and in any dtype."""

    row_alignment = 1

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def product(self, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        """See :class:`Kernels`."""
        return rounded(x_RI, self.recipe.input) @ rounded(weight_OI, self.recipe.weight).t()

    def input_gradient(self, gradient_RO: Tensor, weight_OI: Tensor) -> Tensor:
        """See :class:`Kernels`."""
        return rounded(gradient_RO, self.recipe.gradient) @ rounded(weight_OI, self.recipe.weight_in_gradient)

    def grouped_product(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`Kernels`."""
        rows_RI, weight_EOI = rounded(rows_RI, self.recipe.input), rounded(weight_EOI, self.recipe.weight)
        return torch._grouped_mm(rows_RI, weight_EOI.transpose(-2, -1), offs=offsets_E)

    def grouped_input_gradient(self, gradient_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`Kernels`."""
        gradient_RO = rounded(gradient_RO, self.recipe.gradient)
        return torch._grouped_mm(gradient_RO, rounded(weight_EOI, self.recipe.weight_in_gradient), offs=offsets_E)


class DenseProduct:
    """``x W^T`` in FP8 for a linear layer, any number of leading dimensions; differentiable."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels

    def __call__(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        y: Tensor = _Dense.apply(x, weight_OI, self.kernels)
        return y


class Fp8GroupedProduct(GroupedMM):
    """A :class:`model.grouped_product.GroupedProduct` in FP8; weight gradients are the base class's."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.row_alignment = kernels.row_alignment

    def multiply(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`model.grouped_product.Kernel`."""
        return self.kernels.grouped_product(rows_RI, weight_EOI, offsets_E)

    def rows_gradient(self, grad_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`model.grouped_product.Kernel`."""
        return self.kernels.grouped_input_gradient(grad_RO, weight_EOI, offsets_E)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.kernels = kernels
        return kernels.product(x.flatten(0, -2), weight_OI).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight_OI = ctx.saved_tensors
        gradient_RO = gradients[0].flatten(0, -2)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = ctx.kernels.input_gradient(gradient_RO, weight_OI).view_as(x) if needs_x else None
        return dx, gradient_RO.t() @ x.flatten(0, -2) if needs_weight else None, None
