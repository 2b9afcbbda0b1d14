"""A sweep with real training: two ranks a cell through the launcher, stopped in the middle, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_runs import committed, make_dataset, training_lines

sys.path.insert(0, str(Path(__file__).parents[1] / "launch" / "sweeping"))

from tiny_sweep import base_settings

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(900)]

STEPS = 150


def start_sweep(root: Path, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "launch/sweep.py", str(path)],
        cwd=root,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_stopped_sweep_saves_its_cell_and_ends_it_when_started_again(repository_root: Path, tmp_path: Path) -> None:
    base: dict[str, Any] = base_settings(make_dataset(tmp_path / "made", seed=5))
    base["parallel"] = {"expert_parallel_size": 2, "micro_batch_size": 1}
    base["logging"] |= {"wandb": "auto"}  # WANDB_MODE is offline here
    (tmp_path / "base.json").write_text(json.dumps(base))
    values: dict[str, Any] = {"name": "real", "dir": str(tmp_path / "runs"), "config": str(tmp_path / "base.json")}
    values |= {"sizes": {"d16": {"schedule.steps": STEPS}}, "ranks": 2}
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(values))
    cell = tmp_path / "runs" / "real" / "d16-s0"

    sweep = start_sweep(repository_root, path)
    deadline = time.monotonic() + 600
    while not committed(cell):
        assert sweep.poll() is None, sweep.communicate()[0]
        assert time.monotonic() < deadline, (cell / "train.log").read_text()
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    output, _ = sweep.communicate(timeout=300)
    assert sweep.returncode == 75, output
    assert "d16-s0: ended with status 75" in output
    saved = max(committed(cell))
    assert saved == max(line["step"] for line in training_lines(cell)) < STEPS, "a step was lost"
    assert (tmp_path / "runs" / "real" / "results.jsonl").read_text() == ""

    sweep = start_sweep(repository_root, path)
    output, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, output
    assert f"d16-s0: goes on from step {saved}" in output
    assert [line["step"] for line in training_lines(cell)] == list(range(1, STEPS + 1))
    row = json.loads((tmp_path / "runs" / "real" / "results.jsonl").read_text())
    assert row["tokens"] == row["budget"]["tokens"] == STEPS * 128
    # What was planned is what was executed.
    loops = [line["loops"] for line in training_lines(cell)]
    assert sum(loops) / STEPS == pytest.approx(row["budget"]["executed_loops"])
    evaluation = json.loads((cell / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["bits_per_byte"] == evaluation["validation_bits_per_byte"]
    plan = json.loads((cell / "plan.json").read_text())["logging"]
    assert {folder.name.rpartition("-")[2] for folder in (cell / "wandb").glob("offline-run-*")} == {plan["wandb_id"]}
