"""Parity and copy: groups of lengths, and all strings of a length alike."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.tasks import Copy, Parity


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(0, 40), st.data())
def test_groups_are_even_and_hold_every_length_once(first: int, more: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, more + 1))
    task = Parity(min_length=first, max_length=first + more, length_groups=groups)
    assert [size for sizes in task.sizes for size in sizes] == list(range(first, first + more + 1))
    assert len(task.sizes) == len(set(task.difficulties)) == groups
    assert max(map(len, task.sizes)) - min(map(len, task.sizes)) <= 1


def test_difficulties_are_named_by_their_lengths() -> None:
    task = Copy(min_length=3, max_length=8, length_groups=4, beyond=(9, 20))
    assert task.difficulties == ("3_symbols", "4_to_5_symbols", "6_symbols", "7_to_8_symbols")
    assert task.difficulties_beyond == ("9_symbols", "20_symbols")
    for problem in itertools.islice(task.problems("train", 0, 0), 100):
        first, *last = problem.difficulty.removesuffix("_symbols").split("_to_")
        assert int(first) <= len(problem.identity) <= int(last[0] if last else first)


@pytest.mark.parametrize(
    "task",
    [Parity(min_length=4, max_length=4, length_groups=1), Copy(symbols=2, min_length=4, max_length=5, length_groups=1)],
)
def test_the_two_parts_of_the_split_are_all_strings(task: Parity | Copy) -> None:
    lengths = {length for sizes in task.sizes for length in sizes}
    everything = {"".join(each) for length in lengths for each in itertools.product(task.alphabet[:2], repeat=length)}
    held_out = {problem.identity for problem in task.distinct_problems("validation", 10_000)}
    trained = {problem.identity for problem in itertools.islice(task.problems("train", 0, 0), 2000)}
    assert held_out | trained == everything
    assert not held_out & trained
