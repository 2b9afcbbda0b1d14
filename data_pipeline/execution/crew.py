"""Handing out pieces to workers: whoever is free gets the next one.

Where workers come from (processes here, tasks of a Slurm array, MPI ranks) is a :class:`Crew`'s business. Pieces are
given out in rising order, which makes the error that a user sees the same every time: when a piece fails, all lower
ones were given out before it, so once those have ended the lowest failure is known, and higher ones need not be waited
for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.execution.pieces import Failure, Work, WorkersLostError, raise_first


@dataclass(frozen=True)
class Joined:
    """A worker came, and is free."""

    worker: Hashable


@dataclass(frozen=True)
class Finished:
    """A worker ended its piece, well or with a failure, and is free."""

    worker: Hashable
    failure: Failure | None


@dataclass(frozen=True)
class Lost:
    """A worker is gone; ``reason`` says how, for people."""

    worker: Hashable
    reason: str


class Crew(Protocol):
    """Workers that come, work and may be lost."""

    def events(self) -> Iterable[Joined | Finished | Lost]:
        """What happened since the last call; waits a moment for something to happen."""

    def give(self, worker: Hashable, piece: int) -> None:
        """Let a free worker begin ``piece``."""

    @property
    def over(self) -> str | None:
        """Why no worker is left and none will come, for people; None as long as there is hope."""


def hand_out(work: Work, todo: Sequence[int], crew: Crew, lost_is_failure: bool) -> None:
    """Get the pieces ``todo`` done.

    Raises the failure of the lowest piece that failed; a worker that was lost is a failure of its piece too, or, when
    not ``lost_is_failure``, a reason for another attempt (``WorkersLostError``).
    """
    waiting, free = deque(sorted(todo)), deque[Hashable]()
    busy: dict[Hashable, int] = {}
    failures: dict[int, Failure] = {}
    lost: dict[int, str] = {}
    finished = 0
    while waiting or busy:
        if failures and not any(piece < min(failures) for piece in busy.values()):
            break
        if (reason := crew.over) is not None:
            lost |= dict.fromkeys([*busy.values(), *waiting], reason)
            break
        while free and waiting and not failures:
            worker = free.popleft()
            busy[worker] = waiting.popleft()
            crew.give(worker, busy[worker])
        for event in crew.events():
            piece = busy.pop(event.worker, None)
            if isinstance(event, Lost):
                if event.worker in free:
                    free.remove(event.worker)
                if piece is not None and lost_is_failure:
                    failures[piece] = Failure(piece, f"{work.describe(piece)}: {event.reason}", bad_input=False)
                elif piece is not None:
                    lost[piece] = event.reason
                continue
            free.append(event.worker)
            if isinstance(event, Finished) and piece is not None:
                if event.failure is not None:
                    failures[piece] = event.failure
                else:
                    finished += 1
    if failures and not any(piece < min(failures) for piece in lost):
        raise_first(failures.values())
    if lost:
        first = min(lost)
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise WorkersLostError(f"{work.describe(first)}{more}: {lost[first]}", finished)
