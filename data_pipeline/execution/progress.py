"""What people watch: a bar with rate and time left on a terminal, one plain line a stage in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipeline.execution.tally import read_tallies, tally_sum

POLL_SECONDS = 0.3
NAME_WIDTH = 10


class Reporter:
    """Prints to standard output; bars only when that is a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    def line(self, name: str, text: str) -> None:
        """One finished line about the stage ``name``."""
        self.console.print(f"{name:{NAME_WIDTH}} {text}", markup=False)

    @contextmanager
    def watch(self, name: str, tallies: Sequence[Path], total_bytes: int | None) -> Iterator[None]:
        """While the body runs, show the bytes that the ``tallies`` folders count, out of ``total_bytes`` in each."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn(f"{name:{NAME_WIDTH}}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        done = threading.Event()
        with Progress(*columns, console=self.console, transient=True) as progress:
            total = total_bytes * max(len(tallies), 1) if total_bytes else None
            task = progress.add_task(name, total=total, rate="")
            start = time.monotonic()

            def poll() -> None:
                while not done.wait(POLL_SECONDS):
                    seen = sum(tally_sum(read_tallies(folder))["bytes"] for folder in tallies)
                    rate = seen / (time.monotonic() - start) / 1e6
                    progress.update(task, completed=seen, rate=f"{seen / 1e6:.1f} MB {rate:.1f} MB/s")

            thread = threading.Thread(target=poll, daemon=True)
            thread.start()
            try:
                yield
            finally:
                done.set()
                thread.join()
