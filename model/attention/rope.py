r"""Rotary position embedding (Su et al. 2021), half-split layout.

Channel i and channel i + d/2 form a pair, rotated at position p by the angle ``p * theta^(-2i/d)``. (DeepSeek's
checkpoints store the pairs interleaved; that layout is this one with the rows of the projection permuted.)

The tables are computed for each forward from the positions, in float64, rather than kept in a buffer: engines cast
buffers to bf16, and at position 1M an fp32 product is already off by 0.06 radians.
"""

from __future__ import annotations

import torch


def rope_tables(
    start: int, length: int, rope_dim: int, theta: float, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (length, rope_dim / 2) fp32, of positions ``start ... start + length - 1``."""
    exponents = torch.arange(0, rope_dim, 2, dtype=torch.float64, device=device) / rope_dim
    positions = torch.arange(start, start + length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, theta**-exponents)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` (..., length, rope_dim) by tables (length, rope_dim / 2), in fp32; same shape and dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
