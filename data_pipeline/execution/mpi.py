"""Pieces on MPI ranks: ``mpirun -n 4 python data_pipeline/main.py --config FILE --executor mpi``.

Rank 0 drives and works too: its main thread hands out pieces and is the only one to talk to MPI (so any thread level
will do), and a second thread does pieces. The other ranks wait for work. Ranks poll, ten times a second at rest: MPI's
own receive would keep a core busy all through the stages that run on one rank.

A rank that dies takes the whole job with it, which is MPI's rule; run again, it goes on from the finished pieces.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import traceback
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dill  # type: ignore[import-untyped]
from datatrove.pipeline.base import PipelineStep

from data_pipeline.execution.crew import Finished, Joined, hand_out
from data_pipeline.execution.pieces import Failure, PieceFailedError, Work
from launch.settings import EXIT_BAD_INPUT, EXIT_FAILED, BadInputError

DRIVER = 0
BUSY_POLL_SECONDS = 0.002
IDLE_POLL_SECONDS = 0.1


@contextmanager
def open_mpi_executor() -> Iterator[MpiExecutor]:
    """On rank 0 the executor; the other ranks work until it is closed, and leave by ``SystemExit``."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise BadInputError(
            f"--executor mpi: mpi4py cannot be used ({error}); install an MPI library, then: pip install mpi4py"
        ) from None
    world = MPI.COMM_WORLD
    if world.Get_rank() != DRIVER:
        with _abort_on_error(world):
            _serve(world)
        raise SystemExit(0)
    with _abort_on_error(world):
        yield MpiExecutor(world)
        for rank in range(1, world.Get_size()):
            world.send(None, dest=rank)


@contextmanager
def _abort_on_error(world: Any) -> Iterator[None]:
    """Let an error end every rank, after its line: the others are in the middle of pieces, or wait for messages."""
    try:
        yield
    except (BadInputError, PieceFailedError) as error:
        # Not sys.stderr: while rank 0's thread is at a piece, that is silenced.
        print(f"error: {' '.join(str(error).split())}", file=sys.__stderr__, flush=True)
        world.Abort(EXIT_BAD_INPUT if isinstance(error, BadInputError) else EXIT_FAILED)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        world.Abort(EXIT_FAILED)


def _serve(world: Any) -> None:
    """A rank's life: messages are the work (bytes), a piece, or None at the end."""
    work: Work | None = None
    while (message := _receive(world)) is not None:
        if isinstance(message, bytes):
            work = dill.loads(message)
        else:
            assert work is not None
            failure = work.try_piece(message)
            world.send(failure and asdict(failure), dest=DRIVER)


def _receive(world: Any) -> Any:
    waited = 0.0
    while not world.iprobe(source=DRIVER):
        pause = BUSY_POLL_SECONDS if waited < 1.0 else IDLE_POLL_SECONDS
        time.sleep(pause)
        waited += pause
    return world.recv(source=DRIVER)


class MpiExecutor:
    """Runs pieces on all ranks; lives on rank 0."""

    def __init__(self, world: Any) -> None:
        self._world = world

    def run(self, pipeline: Sequence[PipelineStep], tasks: int, logs: Path) -> None:
        """See ``Executor``."""
        work = Work.of(pipeline, tasks, logs)
        todo = work.start()
        before = work.files_before()
        if todo:
            crew = _Ranks(self._world, work, min(self._world.Get_size(), len(todo)))
            hand_out(work, todo, crew, lost_is_failure=True)
            crew.close()
        work.check_complete(before)


class _Ranks:
    """The first ``size`` ranks as a crew; rank 0 by a thread."""

    over = None

    def __init__(self, world: Any, work: Work, size: int) -> None:
        self._world = world
        self._new = list(range(size))
        self._given: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Failure | None] = queue.SimpleQueue()
        message = dill.dumps(work)
        for rank in range(1, size):
            world.send(message, dest=rank)

        def serve_here() -> None:
            while (piece := self._given.get()) is not None:
                self._results.put(work.try_piece(piece))

        self._thread = threading.Thread(target=serve_here, daemon=True)
        self._thread.start()

    def events(self) -> Iterator[Joined | Finished]:
        """See ``Crew``."""
        joined, self._new = self._new, []
        yield from map(Joined, joined)
        if joined:
            return
        time.sleep(BUSY_POLL_SECONDS)
        if not self._results.empty():
            yield Finished(DRIVER, self._results.get())
        from mpi4py import MPI

        status = MPI.Status()
        while self._world.iprobe(source=MPI.ANY_SOURCE, status=status):
            value = self._world.recv(source=status.Get_source())
            yield Finished(status.Get_source(), None if value is None else Failure(**value))

    def give(self, worker: Hashable, piece: int) -> None:
        """See ``Crew``."""
        if worker == DRIVER:
            self._given.put(piece)
        else:
            self._world.send(piece, dest=worker)

    def close(self) -> None:
        """End the thread of rank 0; the other ranks wait for the next work."""
        self._given.put(None)
        self._thread.join()
