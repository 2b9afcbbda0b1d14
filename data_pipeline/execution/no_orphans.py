"""No process of the pipeline outlives a run that was killed, by SIGKILL too.

Left alone, multiprocessing's manager would stay for ever, and pool workers until their task is done.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading

import multiprocess  # type: ignore[import-untyped]

PR_SET_PDEATHSIG = 1


@functools.cache
def kill_forked_children_with_this_process() -> None:
    """From now on, what this process forks (the manager) dies with it; Linux only, elsewhere nothing changes."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


@functools.cache
def exit_with_the_run() -> None:
    """In a pool's worker, leave as soon as the run is gone; in the run's own process, do nothing.

    A worker's parent, as the system sees it, is the fork server, which lives as long as its workers do; the run is
    what multiprocessing calls the parent.
    """
    run = multiprocess.parent_process()
    if run is not None:

        def watch() -> None:
            run.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
