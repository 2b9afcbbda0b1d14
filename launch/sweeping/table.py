"""A sweep on a terminal: a table of its cells that follows them, or plain lines in a log."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from launch.readable import readable
from launch.sweeping.folder import CellFolder, last_metrics
from launch.sweeping.local import CellRun, State

_ORDER: tuple[State, ...] = ("running", "elsewhere", "refused", "failed", "waiting", "finished")
_STYLES = {"running": "cyan", "finished": "green", "refused": "red", "failed": "red", "elsewhere": "yellow"}
_LINES_AROUND = 8  # of a terminal: head, foot, and what is said meanwhile


class SweepTable:
    """Draws the cells; numbers of finished ones are read once, of running ones each time."""

    def __init__(self, runs: list[CellRun], console: Console) -> None:
        self._runs, self._console = runs, console
        self._final: dict[str, tuple[str, str, str]] = {}
        self._started, self._flops_before = time.monotonic(), self._flops_done()

    def __rich__(self) -> RenderableType:
        return self.render(max(4, self._console.height - _LINES_AROUND))

    def render(self, most: int | None = None) -> RenderableType:
        """At most ``most`` cells, those that need to be seen first."""
        shown = self._runs
        if most is not None and len(shown) > most:
            kept = sorted(self._runs, key=lambda run: _ORDER.index(run.state))[:most]
            shown = [run for run in self._runs if run in kept]
        table = Table(box=None, pad_edge=False)
        table.add_column("cell")
        for name in ("parameters", "active", "tokens", "loops", "seed", "FLOPs", "state", "step", "loss", "bits/byte"):
            table.add_column(name, justify="right")
        for run in shown:
            cell = run.folder.cell
            state = f"{run.state}" + (f" ({run.starts})" if run.starts > 1 else "")
            table.add_row(
                cell.name,
                readable(cell.budget.parameters),
                readable(cell.budget.active_parameters),
                readable(cell.budget.tokens),
                f"{cell.budget.executed_loops:.2f}",
                str(cell.seed),
                f"{cell.budget.training_flops:.2e}",
                Text(state, style=_STYLES.get(run.state, "")),
                *self._numbers(run),
            )
        if len(shown) < len(self._runs):
            table.add_row(f"and {len(self._runs) - len(shown)} more")
        return Group(table, Text(self.summary()))

    def summary(self) -> str:
        """Counts, the share of the work that is done, and the time that the rest takes at this rate."""
        counts = Counter(run.state for run in self._runs)
        done, whole = self._flops_done(), sum(run.folder.cell.budget.training_flops for run in self._runs)
        text = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
        text += f"; {done / whole:.0%} of {whole:.2e} FLOPs"
        gained, seconds = done - self._flops_before, time.monotonic() - self._started
        if gained > 0 and counts["running"]:
            text += f", about {_duration((whole - done) / gained * seconds)} left"
        return text

    def _numbers(self, run: CellRun) -> tuple[str, str, str]:
        if run.name in self._final:
            return self._final[run.name]
        if run.state == "waiting" and not run.starts:
            numbers = ("", "", "")
        else:
            line = run.folder.last_step()
            step = f"{line['step'] if line else 0}/{run.folder.cell.steps}"
            loss = "" if line is None or line["loss"] is None else f"{line['loss']:.3f}"
            bits = final_bits(run.folder) if run.state == "finished" else None
            numbers = (step, loss, "" if bits is None else f"{bits:.4f}")
        if run.state == "finished":
            self._final[run.name] = numbers
        return numbers

    def _flops_done(self) -> float:
        total = 0.0
        for run in self._runs:
            line = {"step": run.folder.cell.steps} if run.state == "finished" else run.folder.last_step()
            if line is not None:
                total += run.folder.cell.budget.training_flops * line["step"] / run.folder.cell.steps
        return total


def final_bits(folder: CellFolder) -> float | None:
    """Validation bits a byte after the last step of a finished cell."""
    found = [
        line["validation_bits_per_byte"] for line in last_metrics(folder.path) if "validation_bits_per_byte" in line
    ]
    return float(found[-1]) if found else None


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(minutes, 1)} min"
