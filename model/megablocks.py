r"""The grouped product by MegaBlocks' block-sparse kernels (Gale et al. 2022, arXiv:2211.15841).

The rows of all experts times the matrices of all experts is a matrix (R, E O) of which only a block diagonal is wanted:
the columns of each row's own expert. ``stk`` (stanford-stk, in Triton) computes just those blocks of 128 x 128::

    Y = rows W^T          only where row block and expert meet   (sdd: dense times dense, sparse result)
    d rows = dY W         dsd: sparse times dense
    d W = dY^T rows       dsd of the transposed

``megablocks`` itself pins torch 2.7.0 and imports only with its CUDA extension, so only the kernels below it are used.
Indices are int32: stk's own int16 ones overflow from block 256 on. Costs against MegaBlocks' fused layer: each
product's blocks are copied into rows and back.

Optional: see :func:`megablocks`. On CPU tensors it runs under Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
Shapes: R rows, a multiple of 128 as each expert's are; E experts, I inputs, O outputs, multiples of 128.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from model.grouped_product import differentiable_product

BLOCK = 128
_ADDRESSABLE = 2**31  # stk's kernels add up their offsets in int32
INSTALL = 'expert_backend = "megablocks" needs stanford-stk and triton: pip install "ice-pretrain[megablocks]"'


class MegaBlocks:
    """The products; ``stk`` is the imported package."""

    row_alignment = BLOCK

    def __init__(self, stk: Any) -> None:
        self._stk = stk

    def __call__(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`~model.grouped_product.GroupedProduct`; rows past the last offset come out as zeros.

        Raises:
            ValueError: When rows, inputs or outputs are no multiple of 128, or there are too many.
        """
        for name, size in (
            ("rows", rows_RI.shape[0]),
            ("inputs", rows_RI.shape[1]),
            ("outputs", weight_EOI.shape[1]),
        ):
            if size % BLOCK:
                raise ValueError(f"{size} {name}: MegaBlocks multiplies blocks of {BLOCK}")
        (rows, inputs), (experts, outputs, _) = rows_RI.shape, weight_EOI.shape
        for shape in ((experts, outputs, inputs), (rows, inputs), (rows, outputs)):
            if math.prod(shape) >= _ADDRESSABLE:
                raise ValueError(
                    f"{' x '.join(map(str, shape))} numbers: MegaBlocks' kernels address fewer than 2^31 in a tensor; "
                    "make parallel.expert_parallel_size larger or parallel.micro_batch_size smaller"
                )
        output_RO = differentiable_product(self, rows_RI, weight_EOI, offsets_E)
        row_R = torch.arange(rows_RI.shape[0], device=rows_RI.device)
        return output_RO.masked_fill((row_R >= offsets_E[-1]).unsqueeze(1), 0)

    def multiply(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """The products without a graph, (R, O)."""
        outputs = weight_EOI.shape[1]
        if not rows_RI.shape[0]:
            return rows_RI.new_zeros(0, outputs)
        nothing = rows_RI.new_empty(rows_RI.shape[0] // BLOCK * (outputs // BLOCK), BLOCK, BLOCK)
        sparse = self._sparse(nothing, rows_RI.shape[0], weight_EOI, offsets_E)
        blocks: Tensor = self._stk.ops.sdd(rows_RI.contiguous(), weight_EOI.flatten(0, 1).t(), sparse).data
        return blocks.view(-1, outputs // BLOCK, BLOCK, BLOCK).transpose(1, 2).reshape(-1, outputs)

    def rows_gradient(self, grad_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """What flows back to the rows, (R, I)."""
        if not grad_RO.shape[0]:
            return grad_RO.new_zeros(0, weight_EOI.shape[2])
        sparse = self._sparse(_blocks(grad_RO), grad_RO.shape[0], weight_EOI, offsets_E)
        gradient: Tensor = self._stk.ops.dsd(sparse, weight_EOI.flatten(0, 1))
        return gradient

    def add_weight_gradient(
        self, grad_RO: Tensor, rows_RI: Tensor, offsets_E: Tensor, sum_EOI: Tensor, fresh: bool
    ) -> None:
        """Add d W to the sum, or fill a fresh one."""
        if not grad_RO.shape[0]:
            if fresh:
                sum_EOI.zero_()
            return
        sparse = self._sparse(_blocks(grad_RO), grad_RO.shape[0], sum_EOI, offsets_E)
        gradient_EOI = self._stk.ops.dsd(sparse.t(), rows_RI.contiguous()).view_as(sum_EOI)
        sum_EOI.copy_(gradient_EOI) if fresh else sum_EOI.add_(gradient_EOI)

    def _sparse(self, blocks: Tensor, rows: int, weight_EOI: Tensor, offsets_E: Tensor) -> Any:
        """The block-sparse (R, E O) matrix: every row block has the O / 128 blocks of its expert's columns.

        Row blocks past the last offset count as the last expert's; their gradient is zero.
        """
        n_experts, across = weight_EOI.shape[0], weight_EOI.shape[1] // BLOCK
        down, device = rows // BLOCK, blocks.device
        first_rows = torch.arange(0, rows, BLOCK, device=device)
        expert = torch.searchsorted(offsets_E.long(), first_rows, right=True).clamp_(max=n_experts - 1)
        column = (expert.unsqueeze(1) * across + torch.arange(across, device=device)).flatten()
        row = torch.arange(down, device=device).repeat_interleave(across)
        # By column, then by row: the same order of additions every time.
        order = column.argsort(stable=True)
        ends = torch.searchsorted(column[order], torch.arange(n_experts * across, device=device), right=True)
        return self._stk.Matrix(
            (rows, n_experts * weight_EOI.shape[1]),
            blocks,
            row.int(),
            column.int(),
            torch.arange(0, (down + 1) * across, across, dtype=torch.int32, device=device),
            row[order].int(),
            torch.cat((ends.new_zeros(1), ends)).int(),
            order.int(),
        )


def _blocks(dense_RO: Tensor) -> Tensor:
    """(R, O) as (R / 128 * O / 128, 128, 128), row by row of blocks."""
    rows, outputs = dense_RO.shape
    tiles = dense_RO.reshape(rows // BLOCK, BLOCK, outputs // BLOCK, BLOCK).transpose(1, 2)
    return tiles.reshape(-1, BLOCK, BLOCK)


def megablocks() -> MegaBlocks:
    """The backend.

    Raises:
        ModuleNotFoundError: Without its packages; the message says how to install them.
    """
    try:
        import stk
        import stk.ops
    except ImportError as error:
        raise ModuleNotFoundError(f"{INSTALL} ({error})") from error
    return MegaBlocks(stk)
