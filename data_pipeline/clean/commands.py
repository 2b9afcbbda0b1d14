"""The command ``python data_pipeline/main.py train-classifier``; see classifier.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from data_pipeline.execution.progress import Reporter

TRAIN_CLASSIFIER = "train-classifier"


def add_clean_commands(commands: Any) -> None:
    """Add the command to those of ``main.py``."""
    command: argparse.ArgumentParser = commands.add_parser(
        TRAIN_CLASSIFIER, help="train a judge of quality from good and bad documents"
    )
    command.add_argument("--positive", type=Path, nargs="+", required=True, help="JSON lines of good documents")
    command.add_argument("--negative", type=Path, nargs="+", required=True, help="JSON lines of bad documents")
    command.add_argument("--output", type=Path, required=True, help="where the model goes, for clean.classifier.path")
    command.add_argument("--seed", type=int, default=1, help="order of the examples in training (default: 1)")


def run_clean_command(options: argparse.Namespace, reporter: Reporter) -> None:
    """Train, and say how good the model is on examples that it has not seen."""
    from data_pipeline.clean.classifier import TrainingSettings, read_examples, train_classifier
    from launch.settings import parse_settings

    training = parse_settings(TrainingSettings, {"seed": options.seed}, TRAIN_CLASSIFIER)
    description = train_classifier(
        read_examples(options.positive), read_examples(options.negative), training, options.output
    )
    reporter.line(
        "trained",
        f"{options.output}: {description.positive:,} good and {description.negative:,} bad examples, "
        f"right on {description.accuracy:.1%} of those held out",
    )
