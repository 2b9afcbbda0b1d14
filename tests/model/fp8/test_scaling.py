"""Rounding to e4m3 with scales, against a table of e4m3's numbers in float64."""

from __future__ import annotations

import bisect
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.fp8.scaling import (
    BLOCK_OF_128,
    E4M3_MAX,
    ROW,
    ROW_OF_128,
    WHOLE,
    Tile,
    dequantise,
    quantise,
    rounded,
    scale_of,
)

TILES = {"row": ROW, "row_of_128": ROW_OF_128, "block_of_128": BLOCK_OF_128, "whole": WHOLE, "small": Tile(2, 3)}
POSITIVE = sorted(
    {(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)} - {480.0} | {m * 2.0**-9 for m in range(8)}
)


def nearest(value: float) -> float:
    """e4m3's number next to ``value``, the one with an even mantissa when two are."""
    size = abs(value)
    above = bisect.bisect_left(POSITIVE, size)
    if above == len(POSITIVE):
        return math.copysign(E4M3_MAX, value)
    candidates = [POSITIVE[above]] if above == 0 else [POSITIVE[above - 1], POSITIVE[above]]
    # The position in the table counts mantissas, so its parity is the last bit's.
    best = min(candidates, key=lambda number: (abs(number - size), POSITIVE.index(number) % 2))
    return math.copysign(best, value)


def slowly(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """A matrix rounded tile by tile, element by element, in float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    height, width = tile.height or x.shape[0], tile.width or x.shape[1]
    for top, left in itertools.product(range(0, x.shape[0], height), range(0, x.shape[1], width)):
        part = x[top : top + height, left : left + width].double()
        largest = part.abs().max().item()
        scale = 2.0 ** math.ceil(math.log2(largest / E4M3_MAX)) if largest else 1.0
        values = [[scale * nearest(value / scale) for value in row] for row in part.tolist()]
        out[top : top + height, left : left + width] = torch.tensor(values, dtype=torch.float64)
    return out


def uneven(*shape: int) -> torch.Tensor:
    """Numbers of very different sizes, so that many are subnormal in their tile."""
    return torch.randn(shape) * torch.exp2(torch.randint(-20, 20, shape).float())


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_rounding_equals_a_search_for_the_nearest_number(tile: Tile) -> None:
    for x in (uneven(5, 7), torch.randn(4, 130), torch.randn(130, 3) * 1e-20):
        expected = slowly(x, tile)
        assert torch.equal(dequantise(quantise(x, tile), tile).double(), expected)
        assert torch.equal(rounded(x, tile).double(), expected)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_emulation_is_the_eight_bit_tensor_to_the_bit(tile: Tile, dtype: torch.dtype) -> None:
    for shape in ((5, 200), (3, 130, 300), (256, 256), (1, 16), (0, 128)):
        x = uneven(*shape).clamp(-6e4, 6e4).to(dtype)
        assert torch.equal(rounded(x, tile), dequantise(quantise(x, tile), tile, dtype))


def test_every_half_precision_number_rounds_as_the_hardware_cast() -> None:
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    numbers = numbers[numbers.abs() <= E4M3_MAX]
    x = torch.stack([numbers, torch.full_like(numbers, E4M3_MAX)], dim=1)  # the second makes the scale 1
    assert torch.equal(rounded(x, ROW)[:, 0], numbers.to(torch.float8_e4m3fn).float())


@given(st.floats(min_value=2.0**-149, max_value=3.0 * 2**126, width=32))
def test_a_scale_is_the_smallest_power_of_two_that_fits(largest: float) -> None:
    scale = scale_of(torch.tensor(largest)).item()
    assert math.frexp(scale)[0] == 0.5
    assert largest / scale <= E4M3_MAX
    assert scale == 2.0**-110 or largest / (scale / 2) > E4M3_MAX


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_the_error_stays_below_e4m3s_and_rounding_again_changes_nothing(tile: Tile) -> None:
    x = uneven(140, 150)
    got = rounded(x, tile)
    scales = quantise(x, tile).scales
    height, width = tile.height or 140, tile.width or 150
    by_element = scales.repeat_interleave(height, 0)[:140].repeat_interleave(width, 1)[:, :150]
    assert ((got - x).abs() <= torch.maximum(x.abs() * 2**-4, by_element * 2**-10)).all()
    assert torch.equal(rounded(got, tile), got)
    assert quantise(x, tile).values.float().abs().max() <= E4M3_MAX


def test_zeros_stay_zeros_with_a_scale_of_one() -> None:
    for tile in TILES.values():
        quantised = quantise(torch.zeros(4, 256), tile)
        assert (quantised.scales == 1).all()
        assert (quantised.values.float() == 0).all()
        assert (rounded(torch.zeros(4, 256), tile) == 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_what_is_not_finite_makes_its_tile_nan_and_no_other(tile: Tile, poison: float) -> None:
    x = torch.randn(260, 260)
    clean = rounded(x, tile)
    x[3, 5] = poison
    quantised = quantise(x, tile)
    height, width = tile.height or 260, tile.width or 260
    within = torch.zeros(260, 260, dtype=torch.bool)
    top, left = 3 // height * height, 5 // width * width
    within[top : top + height, left : left + width] = True
    for got in (rounded(x, tile), dequantise(quantised, tile)):
        assert got[within].isnan().all()
        assert torch.equal(got[~within], clean[~within])


def test_the_smallest_numbers_become_zero_rather_than_garbage() -> None:
    x = torch.tensor([[1e-45, 1e-40, -1e-38, 2e-36, 3e-35]])
    assert (rounded(x, ROW) - x).abs().max() <= 2.0**-110 * 2**-10
    assert torch.equal(rounded(x, ROW), dequantise(quantise(x, ROW), ROW))
