"""The random state a loop begins from, as a function of the sample and nothing else.

A generator would give a sequence other noise with every other division of the batch over ranks and micro-batches, and a
run that goes on with other ranks would be another run. Here element i of the state of a sequence with key k is made
from the hash of (k, i): SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") gives
two uniform numbers, Box and Muller's transform a normal one. Integers wrap and are the same on every device; the
transform's last bits may differ between kinds of devices. About thirty element-wise operations, once a forward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_HALF_BITS = 32


def _signed(value: int) -> int:
    """The int64 with the bits of a 64-bit ``value``."""
    return value - 2**64 if value >= 2**63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` as if ``x`` were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_64(x: Tensor) -> Tensor:
    """SplitMix64's output function of each int64, as int64."""
    x = (x ^ _shifted(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(_MIX_2)
    return x ^ _shifted(x, 31)


def normal_noise(keys_B: Tensor, length: int, width: int) -> Tensor:
    """Standard normal noise (B, length, width), fp32; row b depends on ``keys_B[b]`` (int64) alone.

    A shorter sequence has the beginning of a longer one's noise.
    """
    stream_B = hash_64(keys_B * _signed(_GAMMA) + 1)
    counter_N = torch.arange(1, length * width + 1, device=keys_B.device) * _signed(_GAMMA)
    bits_BN = hash_64(stream_B[:, None] + counter_N)
    high_BN, low_BN = _shifted(bits_BN, _HALF_BITS), bits_BN & (2**_HALF_BITS - 1)
    # fp32 has 24 bits: the middles of 2^24 intervals, none of them 0 or 1.
    uniform_BN, angle_BN = (((half >> 8).float() + 0.5) * 2.0**-24 for half in (high_BN, low_BN))
    noise_BN = torch.sqrt(-2 * torch.log(uniform_BN)) * torch.cos(2 * math.pi * angle_BN)
    return noise_BN.view(-1, length, width)
