"""Being asked to stop: a signal sets a flag, the ranks agree at the next step, the run saves and exits 75.

Schedulers announce the end of an allocation with a signal (Slurm: ``--signal=USR1@300``), and it may reach one rank
only. So nothing is done but to remember, and the ranks agree at fixed points: before each step, and before each batch
of an evaluation. The watchdog passes the word to the other ranks within a second (:meth:`StopRequest.set`), since one
that waits for its data reaches no such point.

Python runs a signal's handler in the main thread, between two of its own instructions: not while that thread hangs in a
collective. So a thread of our own reads the signals' numbers from the descriptor that the interpreter's C handler
writes them to at once (``signal.set_wakeup_fd``), and a second SIGINT ends the process also then.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STATUS_INTERRUPTED = 128 + signal.SIGINT


class StopRequest:
    """Remembers that this process got a stop signal; a second SIGINT ends it at once. Build it in the main thread."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._asked_elsewhere = threading.Event()
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    def is_set(self) -> bool:
        """Whether this rank was asked to stop, or heard that another was."""
        return self.received is not None or self._asked_elsewhere.is_set()

    def set(self) -> None:
        """Another rank was asked to stop."""
        self._asked_elsewhere.set()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def _listen(self, reader: socket.socket) -> None:
        interrupts = 0
        while numbers := reader.recv(64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self.received = signal.Signals(number)
                interrupts += number == signal.SIGINT
            if interrupts > 1:
                os._exit(STATUS_INTERRUPTED)
