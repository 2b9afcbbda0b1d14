"""Faults are recorded by whoever meets them, and a record that fails ends nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from pretrain.fault_log import FaultLog


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    def write(rank: int) -> None:
        log = FaultLog(tmp_path, rank)
        for number in range(50):
            log.add("skipped_step", step=number, samples=list(range(200)))

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert sorted((entry["rank"], entry["step"]) for entry in entries) == [(r, n) for r in range(4) for n in range(50)]
    assert {"time", "kind", "rank", "host", "step", "samples"} == entries[0].keys()


def test_a_folder_that_is_gone_is_said_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FaultLog(tmp_path / "gone", 3).add("roll_back", step=7)
    said = capsys.readouterr().err
    assert "No such file or directory; not recorded:" in said
    assert '"step": 7' in said
