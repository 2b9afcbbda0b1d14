"""What people watch: a bar on a terminal, a line every half a minute in a log, and one line a stage at its end.

A stage's tallies (tally.py) are read now and then. It may count its documents at several points, one after the other or
at once, so a count is the mean over its tallies. Pieces that an earlier attempt finished count as done but not
for the rate: their tallies are older than this attempt.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from data_pipeline.execution.tally import read_tallies, tally_sum

POLL_SECONDS = 0.3
LINE_SECONDS = 30.0
# Reading the tallies of thousands of pieces takes a while; it shall take no more than this share of a core.
POLL_SHARE = 0.05
NAME_WIDTH = 10


@dataclass(frozen=True)
class Status:
    """How far a stage is: documents and bytes done, of these in this attempt, and out of how many bytes if known."""

    documents: int
    size_bytes: int
    new_documents: int
    new_bytes: int
    total_bytes: int | None
    seconds: float

    @classmethod
    def read(cls, tallies: Sequence[Path], total_bytes: int | None, since: float, seconds: float) -> Status:
        """The status after ``seconds``, from tallies; older ones than ``since`` are an earlier attempt's."""
        every = [tally_sum(read_tallies(folder)) for folder in tallies]
        new = [tally_sum(read_tallies(folder, since)) for folder in tallies]

        def mean(counts: list[dict[str, int]], unit: str) -> int:
            return sum(count[unit] for count in counts) // max(len(tallies), 1)

        units = (mean(every, "documents"), mean(every, "bytes"), mean(new, "documents"), mean(new, "bytes"))
        return cls(*units, total_bytes, seconds)

    @property
    def seconds_left(self) -> float | None:
        """At the rate of this attempt; None while that or the end is unknown."""
        if not self.total_bytes or not self.new_bytes:
            return None
        return max(self.total_bytes - self.size_bytes, 0) * self.seconds / self.new_bytes

    def __str__(self) -> str:
        rates = f"{self.new_documents / self.seconds:,.0f} documents/s, {self.new_bytes / self.seconds / 1e6:.2f} MB/s"
        of = f" of {self.total_bytes / 1e6:,.1f}" if self.total_bytes else ""
        left = self.seconds_left
        time_left = "" if left is None else f", {timedelta(seconds=round(left))} left"
        return f"{self.documents:,} documents, {self.size_bytes / 1e6:,.1f}{of} MB, {rates}{time_left}"


class Reporter:
    """Prints to standard output; bars only when that is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def line(self, name: str, text: str) -> None:
        """One finished line about the stage ``name``."""
        self.console.print(f"{name:{NAME_WIDTH}} {text}", markup=False)

    @contextmanager
    def watch(self, name: str, tallies: Sequence[Path], total_bytes: int | None) -> Iterator[None]:
        """While the body runs, show how far the ``tallies`` folders are, out of ``total_bytes`` in each."""
        columns = (
            TextColumn(f"{name:{NAME_WIDTH}}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
        )
        terminal = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not terminal) as progress:
            task = progress.add_task(name, total=total_bytes or None, status="")

            def show(status: Status) -> None:
                if terminal:
                    progress.update(task, completed=status.size_bytes, status=str(status))
                elif status.size_bytes:
                    self.line(name, str(status))

            with _polling(show, tallies, total_bytes, POLL_SECONDS if terminal else LINE_SECONDS):
                yield


@contextmanager
def _polling(
    show: Callable[[Status], None], tallies: Sequence[Path], total_bytes: int | None, every_seconds: float
) -> Iterator[None]:
    """Call ``show(status)`` in a thread, as often as asked for or as reading the tallies allows."""
    done = threading.Event()
    start = time.monotonic()
    # The attempt's folder is as old as the attempt, by the clock of the machine that holds the files.
    since = tallies[0].parent.parent.stat().st_mtime if tallies else 0.0

    def poll() -> None:
        pause = every_seconds
        while not done.wait(pause):
            before = time.monotonic()
            show(Status.read(tallies, total_bytes, since, before - start))
            pause = max(every_seconds, (time.monotonic() - before) / POLL_SHARE)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
