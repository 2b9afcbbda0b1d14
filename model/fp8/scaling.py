r"""Eight-bit floats with a scale for each tile: what is kept of a matrix when it is multiplied in FP8.

    scale = 2^k,  the smallest with  max|tile| / scale <= 448        x  ~  scale * e4m3(x / scale)

e4m3 (Micikevicius et al. 2022, "FP8 formats for deep learning") has one sign, four exponent and three mantissa bits:
normal numbers from 2^-6 to 448, and subnormals in steps of 2^-9 below. So an element is off by at most 2^-4 of itself,
or by 2^-10 of the scale where it lies more than 2^-14 below the tile's largest.

Scales are powers of two (as in torchao's row-wise recipe, in DeepSeek-V3.1 and in the MX formats): a scale that is not
divided by exactly would add a second rounding, and would gain nothing, since rounding is relative to the element. The
product of a scale and an e4m3 number is then exact in fp32 and in bf16, which is what lets a CPU *emulate* FP8 to the
bit: :func:`rounded` gives ``scale * e4m3(x / scale)`` in five passes over x, without an eight-bit tensor (whose
conversion to fp32 alone takes four times as long on a CPU). :func:`quantise` gives the eight-bit tensor and its scales.

Nothing is hidden: a tile that holds a NaN or an infinity becomes NaN throughout, so that the step is skipped as it is
in high precision. (A cast alone would turn an infinity into 448.)

Shapes: a tensor (..., M, K) is cut into tiles of a :class:`Tile`'s height and width, the last ones smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0  # 0.875 * 2^9
_SMALLEST_NORMAL = 2.0**-6
_SMALLEST_SCALE_EXPONENT = -110
_EXPONENT_BITS = 0x7F800000
_ROUNDER = 1.5 * 2.0**20  # adding it to a number in [1, 2) leaves three bits behind the point


class Tile(NamedTuple):
    """Elements that share a scale; None is the matrix's whole extent."""

    height: int | None
    width: int | None


ROW = Tile(1, None)
ROW_OF_128 = Tile(1, 128)
BLOCK_OF_128 = Tile(128, 128)
WHOLE = Tile(None, None)


class Quantised(NamedTuple):
    """A tensor in eight bits: ``values * scales``, each scale over its tile."""

    values: Tensor  # (..., M, K) e4m3
    scales: Tensor  # (..., tiles in M, tiles in K) fp32, powers of two, or NaN


def scale_of(largest: Tensor) -> Tensor:
    """The smallest power of two, from 2^-110 on, by which ``largest`` (not negative) fits into e4m3; fp32.

    1 where ``largest`` is 0; NaN where it is NaN or infinite. Below 2^-110 fp32 itself would run out of mantissa bits
    in a tile's small elements: what lies 2^-9 below that becomes 0.
    """
    mantissa, exponent = torch.frexp(largest.float())  # largest = mantissa * 2^exponent, mantissa in [0.5, 1)
    exponent = (exponent - 9 + (mantissa > 0.875)).clamp_(min=_SMALLEST_SCALE_EXPONENT)
    scale = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(largest.isfinite(), scale, torch.nan).masked_fill_(largest == 0, 1.0)


def quantise(x: Tensor, tile: Tile) -> Quantised:
    """``x`` (..., M, K) in e4m3 with a scale for each tile.

    bf16 is divided in bf16, which is exact for powers of two and takes half the memory; fp16 has too few exponents.
    """
    tiles = _tiles(x.float() if x.dtype == torch.float16 else x, tile)
    scales = scale_of(_largest(tiles))
    return Quantised(_whole(tiles / scales.to(tiles.dtype), x).to(E4M3), scales.squeeze((-3, -1)))


def dequantise(quantised: Quantised, tile: Tile, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor (..., M, K) that ``quantised`` stands for."""
    tiles = _tiles(quantised.values.float(), tile) * quantised.scales.unsqueeze(-1).unsqueeze(-3)
    return _whole(tiles, quantised.values).to(dtype)


def rounded(x: Tensor, tile: Tile) -> Tensor:
    """``dequantise(quantise(x, tile), tile, x.dtype)``, to the bit, for elements below 2^106.

    An element is rounded to a multiple of its own power of two, over 8; for subnormals, of the smallest normal's.
    """
    tiles = _tiles(x.float(), tile)
    smallest_normal = scale_of(_largest(tiles)) * _SMALLEST_NORMAL
    own_power = (tiles.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    rounder = torch.maximum(own_power, smallest_normal).mul_(_ROUNDER)
    return _whole((tiles + rounder).sub_(rounder), x).to(x.dtype)


def _tiles(x: Tensor, tile: Tile) -> Tensor:
    """(..., M, K) as (..., tiles in M, height, tiles in K, width), padded with zeros."""
    rows, columns = x.shape[-2:]
    height, width = tile.height or max(rows, 1), tile.width or columns
    if rows % height or columns % width:
        x = F.pad(x, (0, -columns % width, 0, -rows % height))
    return x.contiguous().view(*x.shape[:-2], x.shape[-2] // height, height, x.shape[-1] // width, width)


def _largest(tiles: Tensor) -> Tensor:
    """The largest magnitude of each tile, (..., tiles in M, 1, tiles in K, 1); NaN where there is one."""
    return tiles.abs().amax(dim=-1, keepdim=True).amax(dim=-3, keepdim=True)


def _whole(tiles: Tensor, like: Tensor) -> Tensor:
    """The reverse of :func:`_tiles`."""
    rows, columns = like.shape[-2:]
    x = tiles.flatten(-4, -3).flatten(-2, -1)
    return x[..., :rows, :columns]
