"""What people see of a sweep: a table that follows its cells, those first that need to be seen."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launch.readable import readable
from launch.sweep import load_sweep, run_local
from launch.sweeping.local import CellRun
from launch.sweeping.lock import sweep_lock
from launch.sweeping.table import SweepTable

WriteSweep = Callable[..., Path]


def test_a_table_longer_than_the_terminal_shows_what_is_going_on(write_sweep: WriteSweep) -> None:
    folders = load_sweep(write_sweep(seeds=list(range(10))))[1]
    runs = [CellRun(folder) for folder in folders]
    runs[17].state, runs[18].state, runs[18].starts = "refused", "running", 3
    console = Console(file=io.StringIO(), width=160, height=12, force_terminal=True, record=True)
    console.print(SweepTable(runs, console))
    text = console.export_text()
    assert "d24-s7" in text
    assert "running (3)" in text
    assert "and 16 more" in text
    assert "1 running, 1 refused, 18 waiting; 0% of" in text


def test_on_a_terminal_the_table_follows_the_cells(
    write_sweep: WriteSweep, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(d24_s0=["crash"])
    sweep, folders = load_sweep(write_sweep())
    console = Console(file=io.StringIO(), width=160, height=40, force_terminal=True, record=True)
    with sweep_lock(sweep.path):
        assert run_local(sweep, folders, console) == 0
    text = console.export_text()
    assert "d24-s0: ended with status 1, tried again" in text
    assert "finished (2)" in text
    assert "20/20" in text
    assert text.rstrip().endswith(f"results: {sweep.path / 'results.jsonl'}")


def test_numbers_are_read_at_a_glance() -> None:
    assert [readable(number) for number in (7, 1234, 1880065, 994e9, 1.5e13)] == ["7", "1.23k", "1.88M", "994G", "15T"]
