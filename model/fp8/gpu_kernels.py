"""Eight-bit matrix products on NVIDIA GPUs: which kernel multiplies what, and how it wants its scales laid out.

                   linear layers                                   experts
    fp8_rowwise    torchao (``torch._scaled_mm``), sm_89 and up    ``torch._scaled_grouped_mm``, sm_90 and up
    fp8_blockwise  ``torch.nn.functional.scaled_mm``, sm_90 with   the same kernel, one call an expert: torch has no
                   CUDA 12.9 (cuBLASLt), not sm_100                grouped one for these scales

torchao's Float8Linear is not used as a module: it saves a transposed view of its weight. Its quantisation and its
product are, called with the operands that ``products.py`` saves.

A product of one call an expert reads the offsets on the host, and so waits for the device once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8.products import BLOCKWISE, ROWWISE
from model.fp8.scaling import Quantised, Tile, quantise


def _one_call_an_expert(product: Any, rows: Tensor, weight: Tensor, offsets_E: Tensor, width: int) -> Tensor:
    output = rows.new_empty(rows.shape[0], width)
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            output[start:end] = product(rows[start:end], weight[expert])
        start = end
    return output


def _second_operand_contiguous(weight: Tensor) -> Tensor:
    """(..., K, N) with K contiguous, which is how the kernels read their second operand."""
    return weight.transpose(-2, -1).contiguous().transpose(-2, -1)


class RowwiseKernels:
    """:data:`~model.fp8.products.ROWWISE` by torchao and ``torch._scaled_grouped_mm``.

    Args:
        grouped: Whether the device has the grouped kernel.
        emulate: Let torchao dequantise and multiply in fp32, as it does in its own tests on a CPU.
    """

    row_alignment = 16

    def __init__(self, grouped: bool = True, emulate: bool = False) -> None:
        """Import torchao, which takes seconds.

        Raises:
            ImportError: It is not installed.
        """
        from dataclasses import replace

        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import Float8Linear
        from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
        from torchao.float8.float8_training_tensor import GemmInputRole

        self.grouped = grouped
        self._config = replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=emulate)
        with torch.device("meta"):
            self._matmul_config = Float8Linear(16, 16, bias=False, config=self._config).linear_mm_config
        self._cast, self._roles = hp_tensor_to_float8_dynamic, GemmInputRole

    def product(self, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        x = self._quantised(x_RI, self._config.cast_config_input, self._roles.INPUT, -1)
        weight = self._quantised(weight_OI.t(), self._config.cast_config_weight, self._roles.WEIGHT, 0)
        return torch.mm(x, weight)

    def input_gradient(self, gradient_RO: Tensor, weight_OI: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        gradient = self._quantised(gradient_RO, self._config.cast_config_grad_output, self._roles.GRAD_OUTPUT, -1)
        # Cast transposed, then turned: torchao's kernels want the second operand column-major, as its own backward has.
        weight = self._quantised(
            weight_OI.t(), self._config.cast_config_weight_for_grad_input, self._roles.WEIGHT, None
        )
        return torch.mm(gradient, weight.t())

    def _quantised(self, x: Tensor, cast: Any, role: Any, axis: int | None) -> Tensor:
        eight_bit: Tensor = self._cast(
            x,
            cast.target_dtype,
            self._matmul_config,
            gemm_input_role=role,
            scaling_granularity=cast.scaling_granularity,
            axiswise_dim=axis,
            round_scales_to_power_of_2=self._config.round_scales_to_power_of_2,
        )
        return eight_bit

    def grouped_product(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        if not self.grouped:
            return _one_call_an_expert(self.product, rows_RI, weight_EOI, offsets_E, weight_EOI.shape[1])
        weight = quantise(weight_EOI, ROWWISE.weight)
        scales_EO = weight.scales.squeeze(-1)
        return self._grouped(rows_RI, ROWWISE.input, weight.values.transpose(-2, -1), scales_EO, offsets_E)

    def grouped_input_gradient(self, gradient_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        if not self.grouped:
            return _one_call_an_expert(self.input_gradient, gradient_RO, weight_EOI, offsets_E, weight_EOI.shape[2])
        weight = quantise(weight_EOI, ROWWISE.weight_in_gradient)
        scales_EI = weight.scales.squeeze(-1).expand(-1, weight_EOI.shape[2]).contiguous()
        values_EOI = _second_operand_contiguous(weight.values)
        return self._grouped(gradient_RO, ROWWISE.gradient, values_EOI, scales_EI, offsets_E)

    def _grouped(self, rows: Tensor, tile: Tile, weight_EKN: Tensor, scales_EN: Tensor, offsets_E: Tensor) -> Tensor:
        left = quantise(rows, tile)
        return torch._scaled_grouped_mm(
            left.values,
            weight_EKN,
            left.scales.squeeze(-1),
            scales_EN,
            offs=offsets_E,
            out_dtype=rows.dtype,
            use_fast_accum=True,
        )


class BlockwiseKernels:
    """:data:`~model.fp8.products.BLOCKWISE` by cuBLASLt, accumulated in fp32 across blocks.

    Rows are padded to 16 and both dimensions of weights to 128, where they are not multiples: what the kernel does with
    parts of blocks is not documented alike everywhere. The sizes of large models are multiples.
    """

    row_alignment = 128

    def product(self, x_RI: Tensor, weight_OI: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        weight = quantise(_padded(weight_OI, 128, 128), BLOCKWISE.weight)
        transposed = Quantised(weight.values.t(), weight.scales.t())
        return _blockwise_product(x_RI, BLOCKWISE.input, transposed)[:, : weight_OI.shape[0]]

    def input_gradient(self, gradient_RO: Tensor, weight_OI: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        weight = quantise(_padded(weight_OI, 128, 128), BLOCKWISE.weight_in_gradient)
        weight = weight._replace(values=_second_operand_contiguous(weight.values))
        return _blockwise_product(gradient_RO, BLOCKWISE.gradient, weight)[:, : weight_OI.shape[1]]

    def grouped_product(self, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        return _one_call_an_expert(self.product, rows_RI, weight_EOI, offsets_E, weight_EOI.shape[1])

    def grouped_input_gradient(self, gradient_RO: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        """See :class:`~model.fp8.products.Kernels`."""
        return _one_call_an_expert(self.input_gradient, gradient_RO, weight_EOI, offsets_E, weight_EOI.shape[2])


def _blockwise_product(rows_RK: Tensor, tile: Tile, weight_KN: Quantised) -> Tensor:
    left = quantise(_padded(rows_RK, 16, 128), tile)
    product_RN = F.scaled_mm(
        left.values,
        weight_KN.values,
        row_block_scales(left.scales),
        F.ScalingType.BlockWise1x128,
        square_block_scales(weight_KN.scales),
        F.ScalingType.BlockWise128x128,
        output_dtype=rows_RK.dtype,
    )
    return product_RN[: rows_RK.shape[0]]


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right of a matrix, up to multiples."""
    below, right = -x.shape[0] % rows, -x.shape[1] % columns
    return F.pad(x, (0, right, 0, below)) if below or right else x


def row_block_scales(scales_RB: Tensor) -> Tensor:
    """Scales of 1 x 128 tiles as cuBLASLt reads them: the rows contiguous."""
    return scales_RB.t().contiguous().t()


def square_block_scales(scales_KN: Tensor) -> Tensor:
    """Scales of 128 x 128 tiles as cuBLASLt reads them: K contiguous, and padded to a multiple of 4 blocks."""
    blocks_k, blocks_n = scales_KN.shape
    padded_NK = scales_KN.new_ones(blocks_n, (blocks_k + 3) // 4 * 4)
    padded_NK[:, :blocks_k] = scales_KN.t()
    return padded_NK.t()
