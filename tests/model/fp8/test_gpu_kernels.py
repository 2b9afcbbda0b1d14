"""The GPU's kernels without a GPU: how their operands are laid out, and what they are asked to multiply.

The kernels themselves are replaced by float products of exactly what they are given; torch's own checks of shapes and
strides run on meta tensors. docs/gpu.md lists what remains for a GPU.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.fp8 import BLOCKWISE, ROWWISE, Emulated
from model.fp8.gpu_kernels import BlockwiseKernels, RowwiseKernels
from model.fp8.scaling import E4M3

OFFSETS = torch.tensor([16, 16, 48, 64], dtype=torch.int32)


def blocks(scales: Tensor, shape: torch.Size, height: int, width: int) -> Tensor:
    """A scale for each element."""
    whole = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return whole[: shape[0], : shape[1]]


def block_scaled_product(
    left: Tensor, right: Tensor, left_scales: Tensor, left_kind: Any, right_scales: Tensor, right_kind: Any, **keys: Any
) -> Tensor:
    """``torch.nn.functional.scaled_mm`` for these scales, as cuBLASLt documents it."""
    assert (left.dtype, right.dtype) == (E4M3, E4M3)
    assert left.is_contiguous()
    assert right.t().is_contiguous()
    (rows, inner), columns = left.shape, right.shape[1]
    assert (left_kind, right_kind) == (F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128)
    assert left_scales.shape == (rows, inner // 128)
    assert left_scales.stride(0) == 1
    padded = (inner // 128 + 3) // 4 * 4
    assert right_scales.shape == (padded, columns // 128)
    assert right_scales.stride(0) == 1
    assert right_scales.shape[1] == 1 or right_scales.stride(1) == padded
    left_values = left.float() * blocks(left_scales, left.shape, 1, 128)
    return (left_values @ (right.float() * blocks(right_scales, right.shape, 128, 128))).to(keys["output_dtype"])


def row_scaled_grouped_product(
    left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor, **keys: Any
) -> Tensor:
    """``torch._scaled_grouped_mm`` for row-wise scales."""
    assert left.is_contiguous()
    assert right.transpose(-2, -1).is_contiguous()
    assert left_scales.is_contiguous()
    assert right_scales.is_contiguous()
    rows, experts = left.float() * left_scales[:, None], right.float() * right_scales[:, None, :]
    return torch._grouped_mm(rows, experts, offs=keys["offs"]).to(keys["out_dtype"])


@pytest.mark.parametrize(("inputs", "outputs"), [(256, 384), (640, 128), (144, 160)])
def test_block_wise_operands_give_what_the_emulation_gives(inputs: int, outputs: int) -> None:
    kernels, emulated = BlockwiseKernels(), Emulated(BLOCKWISE)
    x, weight, gradient = torch.randn(70, inputs), torch.randn(outputs, inputs), torch.randn(70, outputs)
    experts = torch.randn(4, outputs, inputs)
    with mock.patch.object(F, "scaled_mm", block_scaled_product):
        torch.testing.assert_close(kernels.product(x, weight), emulated.product(x, weight))
        torch.testing.assert_close(kernels.input_gradient(gradient, weight), emulated.input_gradient(gradient, weight))
        for method, operand in (("grouped_product", x), ("grouped_input_gradient", gradient)):
            got = getattr(kernels, method)(operand, experts, OFFSETS)
            torch.testing.assert_close(got[:64], getattr(emulated, method)(operand, experts, OFFSETS)[:64])


@pytest.mark.parametrize("grouped", [True, False])
def test_row_wise_operands_give_what_the_emulation_gives(grouped: bool) -> None:
    kernels, emulated = RowwiseKernels(grouped=grouped, emulate=True), Emulated(ROWWISE)
    rows, gradient, experts = torch.randn(70, 96), torch.randn(70, 80), torch.randn(4, 80, 96)
    with mock.patch.object(torch, "_scaled_grouped_mm", row_scaled_grouped_product):
        for method, operand in (("grouped_product", rows), ("grouped_input_gradient", gradient)):
            got = getattr(kernels, method)(operand, experts, OFFSETS)
            torch.testing.assert_close(got[:64], getattr(emulated, method)(operand, experts, OFFSETS)[:64])


def test_torch_accepts_the_operands_shapes_and_strides() -> None:
    with torch.device("meta"):
        x, gradient = torch.empty(64, 256, dtype=torch.bfloat16), torch.empty(64, 384, dtype=torch.bfloat16)
        weight, experts = torch.empty(384, 256, dtype=torch.bfloat16), torch.empty(4, 384, 256, dtype=torch.bfloat16)
        offsets = torch.empty(4, dtype=torch.int32)
    for kernels in (RowwiseKernels(), BlockwiseKernels()):
        assert kernels.product(x, weight).shape == (64, 384)
        assert kernels.input_gradient(gradient, weight).shape == (64, 256)
    assert RowwiseKernels().grouped_product(x, experts, offsets).shape == (64, 384)
    assert RowwiseKernels().grouped_input_gradient(gradient, experts, offsets).shape == (64, 256)
