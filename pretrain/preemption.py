"""Being asked to stop: a signal sets a flag, the ranks agree at the next step, the run saves and exits 75.

Schedulers announce the end of an allocation with a signal (Slurm: ``--signal=USR1@300``), and it may reach one rank
only. So the handler does nothing but remember, and the trainer sums the flags of all ranks once a step, in the
reduction that it makes anyway.
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Remembers that this process got a stop signal; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
