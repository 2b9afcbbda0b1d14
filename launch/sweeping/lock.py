"""Who works on a sweep, and on a cell: locks that end with the process that holds them, whatever ends it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from launch.settings import BadInputError

LOCK = "sweep.lock"


@contextlib.contextmanager
def sweep_lock(path: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Be the one process that runs or collects the sweep in ``path``; ``BadInputError`` while another one does."""
    path.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_seconds
    with (path / LOCK).open("a+") as file:
        while not try_lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise BadInputError(
                    f"{path}: {file.read().strip() or 'another process'} works on this sweep; wait for it"
                )
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def try_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process and those that inherit it; false when others have it.

    Raises ``BadInputError`` on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise BadInputError(f"{file.name}: cannot be locked ({error.strerror}); choose a dir that has locks") from None
    return True
