"""The demo itself, with fewer steps: what a newcomer runs must prepare, train, survive a kill, evaluate and talk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.metrics import read_metrics

STEPS = 160
CHECKPOINT_EVERY = 40


def start_demo(repository_root: Path, run_dir: Path) -> subprocess.Popen[str]:
    """The demo in a process group of its own, so that all of it can be killed at once."""
    settings = {
        "run.dir": run_dir,
        "schedule.steps": STEPS,
        "schedule.warmup_steps": 20,
        "checkpoint.every": CHECKPOINT_EVERY,
        "eval.every": STEPS,
        "eval.sequences": 16,
    }
    command = [sys.executable, "launch/demo.py"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return subprocess.Popen(
        command,
        cwd=repository_root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        start_new_session=True,
    )


@pytest.mark.demo
@pytest.mark.timeout(1500)
def test_demo_survives_a_kill_and_its_model_has_learnt(repository_root: Path, tmp_path: Path) -> None:
    run = tmp_path / "ice_tiny"
    first_checkpoint = run / "checkpoints" / f"step_{CHECKPOINT_EVERY:08d}" / "manifest.json"

    killed = start_demo(repository_root, tmp_path)
    deadline = time.monotonic() + 600
    while not first_checkpoint.exists():
        assert killed.poll() is None, killed.stdout and killed.stdout.read()
        assert time.monotonic() < deadline, "no checkpoint after 10 minutes"
        time.sleep(0.2)
    time.sleep(3)  # into the steps after the checkpoint
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    losses_before = {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}

    resumed = start_demo(repository_root, tmp_path)
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert f"resuming after step {CHECKPOINT_EVERY}" in output
    training = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    losses = {line["step"]: line["loss"] for line in training}
    assert {step: losses[step] for step in losses_before} == losses_before, "the resumed run took another way"

    results = json.loads((run / "evaluation.json").read_text())["by_loops"]
    bits = {int(depth): result["bits_per_byte"] for depth, result in results.items()}
    assert set(bits) == {1, 2, 4, 8}
    reference = re.search(r"gzip -9 on the same text\s*\W?\s*([\d.]+)", output)
    assert reference is not None, output
    assert bits[4] < float(reference.group(1)), "worse than gzip"
    assert bits[4] < bits[1], "the loop does not help"
    for expected in ("parameters, total", "parameters, active a token", "tokens seen", "continuing", "run directory"):
        assert expected in output
    for picture in ("loss.png", "depth.png", "expert_load.png"):
        assert (run / "plots" / picture).read_bytes().startswith(b"\x89PNG")

    again = start_demo(repository_root, tmp_path)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert "already trained" in output
    assert [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line] == training
