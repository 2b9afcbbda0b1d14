"""``sbatch --array slurm/scaling.sh`` on a real Slurm: cells that finish, one that is killed, one that is refused.

The script is the shipped one, unmodified; the sweep's cells are one CPU rank each. The last task of an array has the
array's own number as its job's, so that is the one that is killed: its requeue must not mean the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from slurm_jobs import ENDED, SlurmJob, submit, wait_for

sys.path.insert(0, str(Path(__file__).parents[1] / "multirank"))
sys.path.insert(0, str(Path(__file__).parents[1] / "launch" / "sweeping"))

from tiny_sweep import base_settings
from training_runs import committed, make_dataset, training_lines

from launch.sweep import main

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

STEPS, EVERY = 200, 20
START_SECONDS = 240
SIZES = {
    "finished": {"schedule.steps": 10},
    "refused": {"model.vocab_size": 200, "schedule.steps": 10},
    "killed": {"schedule.steps": STEPS},
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The file of a sweep of three cells in ``tmp_path/runs/array``."""
    base = base_settings(make_dataset(tmp_path / "made", seed=4))
    base["checkpoint"]["every"] = EVERY
    (tmp_path / "base.json").write_text(json.dumps(base))
    values = {"name": "array", "dir": str(tmp_path / "runs"), "config": str(tmp_path / "base.json"), "sizes": SIZES}
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def array(cluster: None, sweep: Path, repository_root: Path) -> Iterator[list[SlurmJob]]:
    """The tasks of its array, in the order of the cells."""
    environment = {"ICE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "ICE_POLL_SECONDS": "1"}
    arguments = ("--array=0-2", "--cpus-per-task=1", "slurm/scaling.sh", str(sweep))
    whole = submit(repository_root, sweep.parent / "%a.log", *arguments, **environment)
    yield [SlurmJob(f"{whole.number}_{index}", sweep.parent / f"{index}.log") for index in range(len(SIZES))]
    whole.cancel()


def rank_of(cell: Path) -> psutil.Process | None:
    """The training process of a cell, if it lives."""
    for process in psutil.process_iter(["cmdline", "name"]):
        words = process.info["cmdline"] or []
        if "python" in process.info["name"] and "pretrain/main.py" in words and str(cell / "plan.json") in words:
            return process
    return None


def test_an_array_trains_every_cell_and_requeues_only_the_one_that_broke(
    array: list[SlurmJob], sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, refused, killed = array
    folder = sweep.parent / "runs" / "array"
    cell = folder / "killed-s0"
    wait_for(lambda: committed(cell) or killed.state in ENDED, START_SECONDS, killed.text)
    rank = rank_of(cell)
    assert rank is not None, killed.text()
    rank.kill()
    saved = max(committed(cell))
    assert killed.wait_for_end(START_SECONDS * 2) == "COMPLETED", killed.text()
    assert killed.restarts == 1
    assert "back in the queue" in killed.text()
    resumed = int(killed.text().rpartition("resuming after step ")[2].split(";")[0])
    assert saved <= resumed < STEPS
    assert [line["step"] for line in training_lines(cell)] == list(range(1, STEPS + 1))

    assert finished.wait_for_end() == "COMPLETED", finished.text()
    assert finished.restarts == refused.restarts == 0
    assert refused.wait_for_end() == "FAILED", refused.text()
    assert refused.field("ExitCode") == "78:0"
    assert len([line for line in refused.text().splitlines() if line.startswith("error:")]) == 1, refused.text()

    # Written by whoever finished a cell; the command that submits goes on from there.
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == ["finished-s0", "killed-s0"]
    assert rows[1]["tokens"] == STEPS * 128
    capsys.readouterr()
    assert main([str(sweep), "--executor", "slurm", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"sbatch --array=1 slurm/scaling.sh {sweep}\n"
