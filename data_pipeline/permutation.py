"""A keyed order of ``range(size)`` that needs no memory: the shuffle of an epoch, place by place.

A Feistel network of six rounds on the smallest even number of bits that holds ``size``, with SplitMix64's finaliser as
its round function; a result outside ``range(size)`` is encrypted again until it lands inside ("cycle walking", Black
and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"), at most four times on average. A Feistel network is a
bijection whatever its round function, and walking a bijection's cycles keeps it one, so every place is visited once.

The cost is six multiplications-and-shifts a place and walk, in numpy: 2 to 3 million places a second and core. How well
it mixes is tested against what a uniformly random order would do: places by chi-square, neighbours, cycles, epochs
(``tests/data_pipeline/test_permutation.py``).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

FEISTEL_ROUNDS = 6


class KeyedPermutation:
    """A bijection of ``range(size)`` chosen by ``key``: the same key gives the same order on every machine."""

    def __init__(self, size: int, key: bytes) -> None:
        if not 0 < size <= 2**62:
            raise ValueError(f"size = {size} must be in [1, 2^62]")
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * FEISTEL_ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of ``indices`` (any shape, each in ``[0, size)``) in the permuted order."""
        values = indices.astype(np.uint64)
        if values.size and int(values.max()) >= self.size:
            raise IndexError(f"indices must lie in [0, {self.size})")
        values = self._encrypt(values)
        outside = values >= self.size
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
