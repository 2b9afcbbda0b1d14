"""Where pipelines run: processes on this machine, tasks of Slurm arrays (slurm.py), or MPI ranks (mpi.py).

One seam: ``executor.run(pipeline, pieces, logs)`` runs the pipeline on every piece (pieces.py) and returns when all are
done; on how many workers, and where, changes no byte.

Why not datatrove's executors: its local one waits for ever when a worker is killed (multiprocessing's pool starts
another worker, but the task is lost) and cannot say which task it was; its Slurm one pickles itself to a file that
every task unpickles, and both believe completion markers that say nothing about files. Its executor base class runs
each piece here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

import dill  # type: ignore[import-untyped]
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import ExecutionSettings
from data_pipeline.execution.crew import Finished, Joined, Lost, hand_out
from data_pipeline.execution.pieces import Work, raise_first
from data_pipeline.execution.worker import receive_result, send_piece, send_work, serve

ROOT = Path(__file__).resolve().parents[2]
EXECUTORS = ("local", "slurm", "mpi")
# Imported once, by the server that workers are forked from: a start then costs milliseconds, not seconds.
WORKER_MODULES = [
    "data_pipeline.inputs.piece_reader",
    "data_pipeline.clean.pipeline",
    "data_pipeline.dedup.minhash",
    "data_pipeline.split",
    "data_pipeline.dataset.tokenise",
    "data_pipeline.dataset.merge",
]


class Executor(Protocol):
    """Runs every piece of a pipeline and returns when all are done.

    Raises ``BadInputError`` for the lowest piece whose input is bad, ``PieceFailedError`` for what else went wrong.
    """

    def run(self, pipeline: Sequence[PipelineStep], tasks: int, logs: Path) -> None:
        """Run ``pipeline`` on pieces 0 to ``tasks - 1``, but for those that an earlier attempt finished."""


class LocalExecutor:
    """Processes on this machine, at most ``workers`` at once; one worker means this very process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, pipeline: Sequence[PipelineStep], tasks: int, logs: Path) -> None:
        """See :class:`Executor`."""
        work = Work.of(pipeline, tasks, logs)
        todo = work.start()
        before = work.files_before()
        if self.workers == 1:
            for piece in todo:
                failure = work.try_piece(piece)
                if failure is not None:
                    raise_first([failure])
        elif todo:
            with _Processes(work, min(self.workers, len(todo))) as crew:
                hand_out(work, todo, crew, lost_is_failure=True)
        work.check_complete(before)


def _start_fork_server() -> None:
    """Start the process that workers are forked from, unless it runs.

    It imports before it hears of this process's ``sys.path``, so from an installed copy unless told otherwise.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before]))
    try:
        forkserver.set_forkserver_preload(WORKER_MODULES)
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class _Processes:
    """A crew of local processes, each with a pipe."""

    def __init__(self, work: Work, workers: int) -> None:
        context = multiprocessing.get_context("forkserver")
        _start_fork_server()
        payload = dill.dumps(work)
        self._processes: dict[Connection, multiprocessing.process.BaseProcess] = {}
        self._new: list[Connection] = []
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            send_work(ours, payload)
            self._processes[ours] = process
            self._new.append(ours)

    def events(self) -> Iterator[Joined | Finished | Lost]:
        """See ``Crew``."""
        joined, self._new = self._new, []
        yield from map(Joined, joined)
        if joined:
            return
        for connection in wait(list(self._processes)):
            assert isinstance(connection, Connection)
            try:
                yield Finished(connection, receive_result(connection))
            except (EOFError, OSError):
                process = self._processes.pop(connection)
                process.join()
                yield Lost(connection, _how_it_ended(process.exitcode or 0))

    def give(self, worker: Hashable, piece: int) -> None:
        """See ``Crew``."""
        assert isinstance(worker, Connection)
        send_piece(worker, piece)

    @property
    def over(self) -> str | None:
        """See ``Crew``."""
        return None if self._processes else "all workers were killed; run again: it goes on from here"

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()  # idle, or at a piece whose result nobody wants any more
        for connection, process in self._processes.items():
            process.join()
            connection.close()


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "its worker was killed (SIGKILL), as when memory runs out; try fewer execution.workers, then run again"
    if status < 0:
        return f"its worker was killed by {signal.Signals(-status).name}; run again: it goes on from here"
    return f"its worker ended with status {status}; run again: it goes on from here"


@contextmanager
def open_executor(name: str, settings: ExecutionSettings) -> Iterator[Executor]:
    """The executor called ``name``.

    Under MPI only rank 0 gets into the body; the other ranks work for it and then leave the process.
    """
    if name == "slurm":
        from data_pipeline.execution.slurm import SlurmExecutor

        yield SlurmExecutor(settings.slurm)
    elif name == "mpi":
        from data_pipeline.execution.mpi import open_mpi_executor

        with open_mpi_executor() as executor:
            yield executor
    else:
        yield LocalExecutor(settings.workers)
