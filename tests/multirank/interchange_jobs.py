"""Jobs about weights in files, for a :class:`rank_pool.RankPool`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rank_jobs import end_engine, save_engine, start_engine, train_on
from scenarios import Step
from torch import Tensor

from launch.environment import discover_place
from launch.settings import parse_settings
from pretrain.config import TrainingConfig
from pretrain.engine import TrainingEngine
from pretrain.interchange.initial_weights import open_initial


def save_and_gather(values: dict[str, Any], folder: Path, steps: list[Step]) -> dict[str, Tensor] | None:
    """Train ``steps``, write the engine's files to ``folder/saved``; the whole weights, on the first rank."""
    engine = start_engine(values)
    train_on(engine, steps)
    save_engine(engine, folder, "saved")
    weights = dict(engine.plain_weights())
    end_engine(engine)
    return weights if engine.place.is_first else None


def start_from(values: dict[str, Any], path: Path, steps: list[Step]) -> tuple[dict[str, Tensor], list[float]] | None:
    """What an engine with ``run.init_from = path`` starts from, and the losses of ``steps``; on the first rank."""
    config = parse_settings(TrainingConfig, values, "scenario")
    engine = TrainingEngine(config, discover_place(), open_initial(path, config.model))
    weights = dict(engine.plain_weights())
    trace = train_on(engine, steps)
    end_engine(engine)
    return (weights, trace.losses) if engine.place.is_first else None
