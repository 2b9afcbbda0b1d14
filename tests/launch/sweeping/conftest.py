"""A tiny sweep's file, a data set for it, and a stand-in for training; modules beside the tests importable by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "multirank"))

from tiny_sweep import STAND_IN, base_settings
from training_runs import make_dataset

from launch.sweeping import local


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set."""
    return make_dataset(tmp_path_factory.mktemp("sweep_data"), seed=3)


@pytest.fixture
def write_sweep(tmp_path: Path, small_data: Path) -> Callable[..., Path]:
    """``write_sweep(key=value, ...)``: the file of a sweep of two sizes in ``tmp_path/runs/small``."""

    def write(base: dict[str, Any] | None = None, **changes: Any) -> Path:
        (tmp_path / "base.json").write_text(json.dumps(base or base_settings(small_data)))
        values = {
            "name": "small",
            "dir": str(tmp_path / "runs"),
            "config": str(tmp_path / "base.json"),
            "sizes": {"d16": {}, "d24": {"model.dim": 24}},
            **changes,
        }
        path = tmp_path / "sweep.json"
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``stand_in(CELL=[action, ...], ...)``: cells are "trained" by the stand-in from now on."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def command(plan: Path, ranks: int, on_gpus: bool) -> list[str]:
        return [sys.executable, str(tmp_path / "stand_in.py"), str(local.ROOT / "pretrain" / "main.py"), str(plan)]

    def script(**actions: list[str]) -> None:
        (tmp_path / "script.json").write_text(json.dumps({name.replace("_", "-"): a for name, a in actions.items()}))
        monkeypatch.setattr(local, "training_command", command)
        monkeypatch.setattr(local, "POLL_SECONDS", 0.02)

    return script
