"""The keyed order is a bijection, frozen, and mixes as a uniformly random order would.

The statistics are over fixed keys, so they are the same on every run; bounds are four standard deviations of what a
uniformly random permutation gives.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.permutation import KeyedPermutation

KEYS = 400


def orders(size: int, keys: int = KEYS) -> NDArray[np.int64]:
    """One whole order a key."""
    return np.stack([KeyedPermutation(size, f"quality/{key}".encode())(np.arange(size)) for key in range(keys)])


def chi_square_excess(counts: NDArray[np.int64]) -> float:
    """How many standard deviations the chi-square statistic of a table with fixed, equal margins is off."""
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = (counts.shape[0] - 1) * (counts.shape[1] - 1)
    return (statistic - freedom) / math.sqrt(2 * freedom)


@given(st.integers(1, 3000), st.binary(max_size=20))
def test_the_permutation_is_a_bijection(size: int, key: bytes) -> None:
    permuted = KeyedPermutation(size, key)(np.arange(size))
    assert sorted(permuted.tolist()) == list(range(size))


@given(st.integers(1, 2**62), st.data())
def test_the_permutation_stays_inside_any_size_and_is_elementwise(size: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8, unique=True)))
    permutation = KeyedPermutation(size, b"key")
    permuted = permutation(indices)
    assert permuted.min() >= 0
    assert permuted.max() < size
    assert len(set(permuted.tolist())) == len(indices)
    assert [int(permutation(np.array([index]))[0]) for index in indices] == permuted.tolist()


def test_the_permutation_is_the_same_on_every_machine() -> None:
    # Frozen: a change would silently give resumed runs other data.
    assert KeyedPermutation(10, b"frozen")(np.arange(10)).tolist() == [5, 9, 7, 3, 6, 2, 4, 0, 1, 8]


def test_indices_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        KeyedPermutation(5, b"")(np.array([5]))
    with pytest.raises(IndexError):
        KeyedPermutation(5, b"")(np.array([-1]))
    with pytest.raises(ValueError, match="size = 0"):
        KeyedPermutation(0, b"")


@pytest.mark.parametrize(("size", "cells"), [(30, 30), (64, 64), (100, 50), (1000, 50)])
def test_every_block_is_equally_likely_at_every_place(size: int, cells: int) -> None:
    found = orders(size)
    counts = np.zeros((cells, cells), dtype=np.int64)
    np.add.at(counts, (np.broadcast_to(np.arange(size), found.shape) * cells // size, found * cells // size), 1)
    assert abs(chi_square_excess(counts)) < 4


def test_one_large_order_spreads_evenly() -> None:
    size, cells = 1_000_000, 100
    order = KeyedPermutation(size, b"large")(np.arange(size))
    counts = np.histogram2d(np.arange(size), order, bins=cells)[0].astype(np.int64)
    assert abs(chi_square_excess(counts)) < 4
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.mean(order[1:] > order[:-1]) - 0.5) < 4 * math.sqrt(1 / 12 / size)


def test_neighbours_stay_neighbours_as_rarely_as_by_chance() -> None:
    size = 1000
    found = orders(size)
    kept = (np.abs(np.diff(found, axis=1)) == 1).sum()
    expected = KEYS * 2 * (size - 1) / size  # Poisson
    assert abs(kept - expected) < 4 * math.sqrt(expected)


def test_fixed_points_and_cycles_are_those_of_a_random_order() -> None:
    size = 1000
    found = orders(size)
    fixed = int((found == np.arange(size)).sum())
    assert abs(fixed - KEYS) < 4 * math.sqrt(KEYS)  # Poisson with mean 1 an order
    cycles = [number_of_cycles(order) for order in found]
    harmonic = sum(1 / k for k in range(1, size + 1))
    variance = harmonic - sum(1 / k**2 for k in range(1, size + 1))
    assert abs(np.mean(cycles) - harmonic) < 4 * math.sqrt(variance / KEYS)


def number_of_cycles(order: NDArray[np.int64]) -> int:
    following, seen, cycles = order.tolist(), [False] * len(order), 0
    for start in range(len(following)):
        if not seen[start]:
            cycles += 1
            at = start
            while not seen[at]:
                seen[at] = True
                at = following[at]
    return cycles


def test_epochs_have_nothing_to_do_with_each_other() -> None:
    size = 2000
    first, second = (
        np.stack([KeyedPermutation(size, f"{key}/{epoch}".encode())(np.arange(size)) for key in range(100)])
        for epoch in (0, 1)
    )
    same = int((first == second).sum())
    assert abs(same - 100) < 4 * math.sqrt(100)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(first, second, strict=True)]
    assert abs(np.mean(correlations)) < 4 / math.sqrt(size * 100)
    assert abs(np.std(correlations) * math.sqrt(size) - 1) < 0.3
