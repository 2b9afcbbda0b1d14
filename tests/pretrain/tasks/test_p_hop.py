"""p-hop: an example by hand, and chains that really move."""

from __future__ import annotations

import itertools

import pytest
from answers import hop

from pretrain.tasks import PHop


def test_the_definition_by_hand() -> None:
    # From the last a: the latest earlier a is followed by c (position 5 of 8); the c before that one by b.
    assert [hop("cbaacbda", hops) for hops in (1, 2)] == ["c", "b"]


def test_no_symbol_follows_itself_and_every_hop_goes_back() -> None:
    task = PHop(max_hops=4, length=24, symbols=4)
    for problem in itertools.islice(task.problems("train", 0, 0), 300):
        hops, text = problem.prompt.removesuffix("=").split(":")
        assert len(text) == 24
        assert all(a != b for a, b in itertools.pairwise(text))
        at = len(text) - 1
        for _ in range(int(hops)):
            earlier = [place for place in range(at) if text[place] == text[at]]
            assert earlier, "the chain left the sequence"
            assert max(earlier) + 1 < at
            at = max(earlier) + 1
        assert text[at] == problem.answer


@pytest.mark.parametrize("symbols", [3, 5])
def test_every_symbol_is_an_answer_as_often_as_another(symbols: int) -> None:
    task = PHop(min_hops=2, max_hops=2, length=24, symbols=symbols)
    answers = [problem.answer for problem in itertools.islice(task.problems("train", 0, 0), 1000)]
    assert all(800 < symbols * answers.count(answer) < 1200 for answer in set(task.alphabet) & set(answers))
    assert len(set(answers)) == symbols
