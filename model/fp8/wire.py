"""Rows of activations in eight bits, as they travel between ranks.

A row of D numbers becomes D bytes of e4m3 and one byte for the scale of each 128 of them, a power of two's exponent
(e8m0, which is exact: ``scaling.py`` makes no other scales). In one tensor of bytes, so that one all-to-all carries
both: D + D / 128 bytes a row instead of 2 D in bf16. A tile that is not finite arrives as NaN.

These are the tiles that the ``fp8_blockwise`` recipe multiplies, and rounding again changes nothing: with that recipe
the forward is the same to the bit whether rows travel so or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.fp8.scaling import E4M3, ROW_OF_128, Quantised, dequantise, quantise

_E8M0 = torch.float8_e8m0fnu


def pack_rows(rows_RD: Tensor) -> Tensor:
    """(R, D) to bytes (R, D + ceil(D / 128))."""
    quantised = quantise(rows_RD, ROW_OF_128)
    return torch.cat((quantised.values.view(torch.uint8), quantised.scales.to(_E8M0).view(torch.uint8)), dim=1)


def unpack_rows(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The rows (R, ``width``) that :func:`pack_rows` made bytes of, rounded."""
    values, scales = packed.split([width, packed.shape[1] - width], dim=1)
    quantised = Quantised(values.contiguous().view(E4M3), scales.contiguous().view(_E8M0).float())
    return dequantise(quantised, ROW_OF_128, dtype)
