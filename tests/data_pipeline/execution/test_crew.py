"""Whoever is free gets the next piece; the error that is raised does not depend on who was faster."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.execution.crew import Finished, Joined, Lost, hand_out
from data_pipeline.execution.pieces import Failure, PieceFailedError, Work, WorkersLostError
from launch.settings import BadInputError


class Script:
    """A crew whose workers finish in the order that ``choices`` say; pieces fail, or take their worker along."""

    def __init__(self, workers: int, choices: list[int], failing: set[int], deadly: set[int]) -> None:
        self.joined = list(range(workers))
        self.choices = choices
        self.failing, self.deadly = failing, deadly
        self.busy: dict[Hashable, int] = {}
        self.left = workers
        self.given: list[int] = []

    def give(self, worker: Hashable, piece: int) -> None:
        assert worker not in self.busy
        self.busy[worker] = piece
        self.given.append(piece)

    @property
    def over(self) -> str | None:
        return None if self.left else "nobody left"

    def events(self) -> Iterator[Joined | Finished | Lost]:
        if self.joined and (not self.busy or self.choices[0] % 2):
            yield Joined(self.joined.pop())
            return
        self.choices = self.choices[1:] + self.choices[:1]
        worker = sorted(self.busy)[self.choices[0] % len(self.busy)]  # type: ignore[type-var]
        piece = self.busy.pop(worker)
        if piece in self.deadly:
            self.left -= 1
            yield Lost(worker, f"piece {piece} took its worker along")
        else:
            yield Finished(worker, Failure(piece, f"bad {piece}", bad_input=True) if piece in self.failing else None)


WORK = Work(b"", 12, Path("logs"))
PIECES = st.sets(st.integers(0, 11), max_size=4)
CHOICES = st.lists(st.integers(0, 100), min_size=1, max_size=20)


@given(st.integers(1, 5), CHOICES, PIECES)
def test_the_failure_of_the_lowest_piece_is_raised_whoever_is_faster(
    workers: int, choices: list[int], failing: set[int]
) -> None:
    crew = Script(workers, choices, failing, set())
    if failing:
        with pytest.raises(BadInputError, match=rf"^bad {min(failing)}( \(and \d more pieces? failed\))?$"):
            hand_out(WORK, range(12), crew, lost_is_failure=True)
    else:
        hand_out(WORK, range(12), crew, lost_is_failure=True)
        assert sorted(crew.given) == list(range(12))
    assert crew.given == sorted(set(crew.given)), "in order, and none twice"


@given(st.integers(1, 5), CHOICES, PIECES, PIECES.filter(bool))
def test_lost_workers_mean_another_attempt_unless_a_lower_piece_failed(
    workers: int, choices: list[int], failing: set[int], deadly: set[int]
) -> None:
    crew = Script(workers, choices, failing - deadly, deadly)
    with pytest.raises((BadInputError, WorkersLostError)) as caught:
        hand_out(WORK, range(12), crew, lost_is_failure=False)
    if isinstance(caught.value, WorkersLostError):
        assert caught.value.finished <= 12 - len(deadly & set(crew.given))
        assert min(deadly) < min(failing - deadly, default=12)
    else:
        assert str(caught.value).startswith(f"bad {min(failing - deadly)}")
        assert min(failing - deadly) < min(deadly & set(crew.given), default=12)
    assert crew.given == sorted(set(crew.given))


def test_a_lost_worker_of_this_machine_is_its_pieces_failure() -> None:
    with pytest.raises(PieceFailedError, match=r"^piece 3 of 12: piece 3 took its worker along$"):
        hand_out(WORK, range(12), Script(2, [0], {7}, {3}), lost_is_failure=True)


def test_nobody_coming_at_all_is_said_with_the_first_piece() -> None:
    with pytest.raises(WorkersLostError, match=r"^piece 4 of 12 \(and 1 more\): nobody left$") as caught:
        hand_out(WORK, [4, 9], Script(0, [0], set(), set()), lost_is_failure=False)
    assert caught.value.finished == 0
