"""Rows that travel in eight bits."""

from __future__ import annotations

import math

import pytest
import torch

from model.fp8 import pack_rows, unpack_rows
from model.fp8.scaling import ROW_OF_128, rounded


@pytest.mark.parametrize(("rows", "width"), [(0, 256), (1, 128), (7, 300), (5, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrives_is_what_was_rounded_in_little_over_a_byte_a_number(
    rows: int, width: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(rows, width) * torch.exp2(torch.randint(-60, 60, (rows, 1)).float())).to(dtype)
    packed = pack_rows(x)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, width + math.ceil(width / 128))
    assert packed.is_contiguous()
    assert torch.equal(unpack_rows(packed, width, dtype), rounded(x, ROW_OF_128))


def test_what_is_not_finite_arrives_as_nan() -> None:
    x = torch.randn(2, 256)
    x[0, 3], x[1, 130] = math.inf, math.nan
    got = unpack_rows(pack_rows(x), 256, torch.float32)
    assert got[0, :128].isnan().all()
    assert got[1, 128:].isnan().all()
    assert torch.equal(got[0, 128:], rounded(x, ROW_OF_128)[0, 128:])
