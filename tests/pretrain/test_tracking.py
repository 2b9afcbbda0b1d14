"""Which mode W&B is started in, and whose process it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.tracking import wandb_mode


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("online", {"WANDB_MODE": "offline"}, "online"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_the_environment_decides_where_the_settings_leave_it(
    monkeypatch: pytest.MonkeyPatch, setting: str, environment: dict[str, str], expected: str
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(setting) == expected


KILLED_RANK = """
import os, signal, sys
from pathlib import Path
from pretrain.config import LoggingSection, RunSection, TrainingConfig
from pretrain.tracking import Trackers

folder = Path(sys.argv[1])
config = TrainingConfig.model_construct(
    run=RunSection.model_construct(name="killed"),
    logging=LoggingSection(wandb="offline", tensorboard=False),
)
Trackers(config, folder, "93e8a308", 0).log(1, {"loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_gives_its_run_id_back_where_its_parent_used_wandb_too(
    tmp_path: Path, repository_root: Path
) -> None:
    parent = """
import subprocess, sys
import wandb

with wandb.init(project="ice", dir=sys.argv[1], mode="offline", settings=wandb.Settings(silent=True, console="off")):
    for _ in range(2):
        print(subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]]).returncode)
"""
    environment = {**os.environ, "PYTHONPATH": str(repository_root)}
    environment.pop("WANDB_SERVICE", None)
    command = [sys.executable, "-c", parent, str(tmp_path), KILLED_RANK]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(-signal.SIGKILL)] * 2, ended.stderr
