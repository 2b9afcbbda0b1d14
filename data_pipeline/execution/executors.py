"""Where pipelines run. One seam: a pipeline, a number of tasks, a folder for logs; local processes today.

datatrove logs to stderr from every task. Users watch our progress instead, so tasks run with stderr redirected; all of
it, tracebacks included, is in ``LOGS/logs/task_*.log``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import multiprocess  # type: ignore[import-untyped]
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from data_pipeline.execution.no_orphans import exit_with_the_run, kill_forked_children_with_this_process
from launch.settings import BadInputError

EXECUTORS = ("local", "slurm", "mpi")
WORKER_MODULES = [
    "data_pipeline.clean.pipeline",
    "data_pipeline.dedup.pipeline",
    "data_pipeline.dataset.shards",
    "data_pipeline.split",
]


class Executor(Protocol):
    """Runs every task of a pipeline and returns when all are done; raises what a task raised."""

    def run(self, pipeline: Sequence[PipelineStep], tasks: int, logs: Path) -> None:
        """Run ``tasks`` tasks of ``pipeline``."""


class _QuietLocalPipelineExecutor(LocalPipelineExecutor):
    """datatrove's local executor without its chatter on the terminal."""

    def _launch_run_for_rank(self, rank: int, *args: Any, **kwargs: Any) -> Any:
        exit_with_the_run()
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            try:
                return super()._launch_run_for_rank(rank, *args, **kwargs)
            finally:
                logger.remove()  # its sink is the redirected stream, closed from here on


class LocalExecutor:
    """Processes on this machine, at most ``workers`` at once; one worker means this very process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run(self, pipeline: Sequence[PipelineStep], tasks: int, logs: Path) -> None:
        """Run ``tasks`` tasks of ``pipeline``; datatrove's own completion markers are not used (see stages.py)."""
        logger.remove()
        kill_forked_children_with_this_process()
        # Workers are forked from a server that has these imported already: a start costs milliseconds, not seconds.
        multiprocess.set_forkserver_preload(WORKER_MODULES)
        _QuietLocalPipelineExecutor(
            pipeline=list(pipeline),
            tasks=tasks,
            workers=min(self.workers, tasks),
            logging_dir=str(logs),
            skip_completed=False,
        ).run()


def create_executor(name: str, workers: int) -> Executor:
    """The executor called ``name``, or a ``BadInputError`` that says which are available."""
    if name != "local":
        raise BadInputError(f"--executor {name}: is not available yet; available now: local")
    return LocalExecutor(workers)
