"""One piece of work on a thread, watched from the training loop.

The thread is a daemon: a process that ends without waiting leaves a folder that is not a checkpoint. Work on a storage
that no longer answers cannot be interrupted, only given up: it stops at the next chunk it manages to write, and until
then no other save begins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class GivenUpError(Exception):
    """The work was told to stop."""


class BackgroundWork:
    """Runs ``work(go_on)`` on a thread of its own, at once.

    ``work`` calls ``go_on`` now and then, which raises ``GivenUpError`` after ``give_up``. What ``work`` raises is kept
    in ``error``.
    """

    def __init__(self, work: Callable[[Callable[[], None]], object]) -> None:
        self._work, self._given_up = work, threading.Event()
        self.started = time.monotonic()
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread is still at it."""
        return self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self.started

    def give_up(self) -> None:
        """Make the next ``go_on`` raise."""
        self._given_up.set()

    def _run(self) -> None:
        try:
            self._work(self._go_on)
        except Exception as error:
            self.error = error

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise GivenUpError("given up")
