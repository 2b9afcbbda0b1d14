"""A run directory opened for reading: what evaluation and generation begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.dataset.reader import Dataset, open_dataset
from launch.settings import BadInputError, load_settings
from model import IceModel
from pretrain.checkpoint import WEIGHTS, newest_valid_checkpoint
from pretrain.config import TrainingConfig
from pretrain.weights import load_model


@dataclass(frozen=True)
class LoadedRun:
    """The configuration, data set, newest intact checkpoint and plain model of a run."""

    config: TrainingConfig
    dataset: Dataset
    checkpoint: Path
    model: IceModel


def load_run(run: Path) -> LoadedRun:
    """Open run directory ``run`` in this process alone, on the CPU; ``BadInputError`` says what is missing."""
    if not (run / "config.json").is_file():
        raise BadInputError(f"{run}: not a run directory (no config.json); train first, or name another with --run")
    config = load_settings(TrainingConfig, run / "config.json")
    checkpoint = newest_valid_checkpoint(run / "checkpoints")
    return LoadedRun(config, open_dataset(Path(config.data.path)), checkpoint, load_model(checkpoint / WEIGHTS))
