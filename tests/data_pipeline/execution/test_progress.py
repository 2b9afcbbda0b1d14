"""Rates and time left, also when a stage goes on where it was cut off."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.execution import progress
from data_pipeline.execution.progress import Reporter, Status
from data_pipeline.execution.tally import write_tally


def write(folder: Path, piece: int, documents: int, size: int, age_seconds: float = 0.0) -> None:
    write_tally(folder, piece, {"prose": {"documents": documents, "bytes": size}})
    stamp = time.time() - age_seconds
    os.utime(folder / f"{piece:05d}.json", (stamp, stamp))


def test_pieces_of_an_earlier_attempt_are_done_but_do_not_count_for_the_rate(tmp_path: Path) -> None:
    write(tmp_path, 0, 60, 6_000_000, age_seconds=1000)
    write(tmp_path, 1, 10, 1_000_000)
    status = Status.read([tmp_path], 10_000_000, time.time() - 100, seconds=2.0)
    assert (status.documents, status.size_bytes) == (70, 7_000_000)
    assert status.seconds_left == pytest.approx(3 / 0.5)
    assert str(status) == "70 documents, 7.0 of 10.0 MB, 5 documents/s, 0.50 MB/s, 0:00:06 left"


def test_a_stage_that_counts_twice_is_done_when_both_counts_are(tmp_path: Path) -> None:
    write(tmp_path / "signed", 0, 10, 1_000_000)
    half = Status.read([tmp_path / "signed", tmp_path / "kept"], 1_000_000, 0.0, seconds=1.0)
    assert (half.documents, half.size_bytes, half.seconds_left) == (5, 500_000, 1.0)
    write(tmp_path / "kept", 0, 9, 900_000)
    assert Status.read([tmp_path / "signed", tmp_path / "kept"], 1_000_000, 0.0, 1.0).size_bytes == 950_000


def test_without_a_total_or_a_rate_no_time_is_promised(tmp_path: Path) -> None:
    assert str(Status.read([tmp_path], None, 0.0, 1.0)) == "0 documents, 0.0 MB, 0 documents/s, 0.00 MB/s"
    assert Status.read([tmp_path], 10, 0.0, 1.0).seconds_left is None


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_in_a_log_and_a_bar_on_a_terminal(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.02)
    folder = tmp_path / "tallies" / "read"
    tmp_path.joinpath("tallies").mkdir()
    stream = io.StringIO()
    reporter = Reporter(Console(file=stream, width=150, force_terminal=terminal))
    with reporter.watch("clean", [folder], 2_000_000):
        write(folder, 0, 10, 1_000_000)
        deadline = time.monotonic() + 10
        while "10 documents, 1.0 of 2.0 MB" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "clean" in stream.getvalue()
    assert "10 documents, 1.0 of 2.0 MB" in stream.getvalue()
    assert ("\x1b" in stream.getvalue()) == terminal
