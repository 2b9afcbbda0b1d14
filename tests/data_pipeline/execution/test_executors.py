"""Local processes: errors, deaths and orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import DataSettings
from data_pipeline.execution import executors
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.pieces import PieceFailedError
from launch.settings import BadInputError

StepFor = Callable[..., PipelineStep]
ContentsOf = Callable[[Path], dict[str, str]]
WholeOutput = Callable[[int], dict[str, str]]


def run(folder: Path, step: PipelineStep, workers: int, pieces: int = 6) -> None:
    folder.mkdir()
    LocalExecutor(workers).run([step], pieces, folder / "logs")


@pytest.mark.parametrize("workers", [1, 2, 9])
def test_any_number_of_workers_writes_the_same(
    workers: int, tmp_path: Path, step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    folder = tmp_path / "stage-0.a.partial"
    run(folder, step_for(folder), workers)
    assert contents_of(folder) == whole_output(6)


def test_of_several_failures_the_first_piece_is_reported(tmp_path: Path, step_for: StepFor) -> None:
    folder = tmp_path / "stage-0.a.partial"
    with pytest.raises(BadInputError, match=r"^input 2: is bad( \(and \d more pieces? failed\))?$"):
        run(folder, step_for(folder, bad=[2, 3, 5]), workers=2)


def test_a_worker_that_is_killed_is_said_and_the_next_run_goes_on(
    tmp_path: Path, step_for: StepFor, contents_of: ContentsOf, whole_output: WholeOutput
) -> None:
    first, second = tmp_path / "stage-0.a.partial", tmp_path / "stage-0.b.partial"
    with pytest.raises(PieceFailedError, match=r"^stage, piece 4 of 6: its worker was killed \(SIGKILL\), as when"):
        run(first, step_for(first, killed=[4]), workers=2)
    run(second, step_for(second, bad=[0, 1, 2]), workers=2)  # those three are finished for sure, and not done again
    assert contents_of(second) == whole_output(6)


def command_for(corpus: Path, folder: Path, root: Path) -> list[str]:
    config = folder / "small.json"
    values = {"name": "small", "output": "out", "sources": [{"path": str(corpus)}], "inputs": {"piece_bytes": 1}}
    config.write_text(json.dumps({**values, "execution": {"workers": 2}}))
    return [sys.executable, str(root / "data_pipeline" / "main.py"), "--config", str(config)]


def test_the_command_says_in_one_line_that_a_worker_died_and_publishes_nothing(
    tmp_path: Path, repository_root: Path, small_corpus: Path
) -> None:
    command = command_for(small_corpus, tmp_path, repository_root)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
        worker = _wait_for_worker(process.pid, tmp_path / "out" / ".stages")
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert errors.count("\n") == 1
    assert "of 3: its worker was killed (SIGKILL)" in errors
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_no_process_outlives_a_run_that_was_killed(tmp_path: Path, repository_root: Path, small_corpus: Path) -> None:
    command = command_for(small_corpus, tmp_path, repository_root)
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        _wait_for_worker(process.pid, tmp_path / "out" / ".stages")
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def _wait_for_worker(run: int, stages: Path) -> int:
    """The process of a worker that has begun a piece: a grandchild, by way of the server that forks."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if list(stages.glob("clean-*/logs/logs/*.log")):
            generations = [child.children() for child in psutil.Process(run).children()]
            workers = [process.pid for generation in generations for process in generation]
            if workers:
                return workers[0]
        time.sleep(0.01)
    raise AssertionError("no worker began")


def test_the_modules_that_workers_share_exist(repository_root: Path) -> None:
    for name in executors.WORKER_MODULES:
        path = repository_root / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_where_work_is_done_is_not_part_of_what_is_done(
    small_corpus: Path,
    small_dataset: Path,
    tmp_path: Path,
    settings_for: Callable[..., DataSettings],
    run_pipeline: Callable[..., list[str]],
) -> None:
    shutil.copytree(small_dataset, tmp_path / "out")
    execution = {"workers": 2, "slurm": {"tasks": 7, "partition": "cpu"}}
    again = run_pipeline(settings_for(small_corpus, tmp_path / "out", execution=execution))
    stages = [line.split()[0] for line in again if "already done" in line]
    assert {"clean", "exact", "minhash", "split", "tokenizer", "shards", "publish"} <= set(stages)
