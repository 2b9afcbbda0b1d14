"""What a person sees while training: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# A step that waited for its data for more than this share of its time says so.
WORTH_SAYING = 0.02


class TrainingConsole:
    """The first rank's display; the others are given ``enabled=False`` and stay silent."""

    def __init__(self, total_steps: int, first_step: int, every: int, enabled: bool) -> None:
        self._every, self._total, self._first, self._enabled = every, total_steps, first_step, enabled
        self._started = time.monotonic()
        self._console = Console(soft_wrap=True)
        self._progress: Progress | None = None
        if enabled and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, numbers="")
            self._progress.start()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._enabled:
            self._console.print(text, highlight=False, markup=False)
            sys.stdout.flush()

    def step(self, line: dict[str, Any]) -> None:
        """Show a training step."""
        if not self._enabled:
            return
        numbers = f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s"
        if line["data_wait_seconds"] > WORTH_SAYING * line["step_seconds"]:
            numbers += f"  waited {line['data_wait_seconds']:.2f} s for data"
        if self._progress is not None:
            self._progress.update(self._task, completed=line["step"], numbers=numbers)
        elif line["step"] % self._every == 0 or line["step"] == self._total:
            done = line["step"] - self._first
            # After a roll-back fewer steps are done than the clock has seen; none at all would divide by zero.
            left = (time.monotonic() - self._started) / max(done, 1) * (self._total - line["step"])
            self.say(
                f"step {line['step']}/{self._total}  {numbers}  lr {line['lr']:.2e}  grad_norm {line['grad_norm']:.2f}"
                f"  loops {line['loops']}  left {_clock(left)}"
            )

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
