"""A run directory opened for reading: what evaluation and generation begin with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_pipeline.tokenizer.interface import Tokenizer
from launch.settings import BadInputError, load_settings
from model import IceModel
from pretrain.checkpoint import WEIGHTS, newest_valid_checkpoint
from pretrain.config import TrainingConfig
from pretrain.data import AnyDataset, open_main
from pretrain.interchange.weight_source import open_checkpoint
from pretrain.run_tokenizer import load_kept_tokenizer
from pretrain.tasks.dataset import TaskDataset
from pretrain.weights import load_model


@dataclass(frozen=True)
class LoadedRun:
    """The configuration, newest intact checkpoint and plain model of a run; its data set and tokenizer when asked for.

    Both properties raise ``BadInputError`` when what they need is missing or damaged.
    """

    path: Path
    config: TrainingConfig
    checkpoint: Path
    model: IceModel

    @cached_property
    def dataset(self) -> AnyDataset:
        """The data set of ``data.path``, or the task."""
        return open_main(self.config.data)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's own copy; the data set's for runs from before there were copies."""
        if not self.config.data.path and isinstance(self.dataset, TaskDataset):
            return self.dataset.tokenizer  # it needs no file, and refuses characters that the task does not have
        return load_kept_tokenizer(self.path) or self.dataset.tokenizer


def load_run(run: Path) -> LoadedRun:
    """Open run directory ``run`` in this process alone, on the CPU; ``BadInputError`` says what is missing."""
    if not (run / "config.json").is_file():
        raise BadInputError(f"{run}: not a run directory (no config.json); train first, or name another with --run")
    config = load_settings(TrainingConfig, run / "config.json")
    checkpoint = newest_valid_checkpoint(run / "checkpoints")
    if (checkpoint / WEIGHTS).is_dir():
        return LoadedRun(run, config, checkpoint, load_model(checkpoint / WEIGHTS))
    return LoadedRun(run, config, checkpoint, open_checkpoint(checkpoint).load())  # checkpoint.plain_weights = false
