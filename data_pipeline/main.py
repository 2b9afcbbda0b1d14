"""Raw text to token shards: ``python data_pipeline/main.py --config configs/data/demo.json``.

The stages, in order, and what each hands on::

    clean          reading, extraction, Unicode, quality      documents
    exact          identical texts                            documents
    minhash        nearly identical texts                     documents
    sentences      passages that occur again (optional)       documents
    decontaminate  what evaluation sets hold (optional)       documents
    split          train or validation, by hash of the text   documents of each split
    tokenizer      SentencePiece BPE on training text         tokenizer.model
    shards         tokens, boundaries, domains, origins       shards of each split
    publish        files into place, manifest last            the data set

Running it again skips what is finished. What became of every document: ``report.html`` and ``report.json``. A judge of
quality is trained with ``python data_pipeline/main.py train-classifier`` (clean/classifier.py). A prepared data set is
looked at with::

    python data_pipeline/main.py verify DIR                            every hash, boundary and token id
    python data_pipeline/main.py inspect DIR [--document N | --search TEXT] [--split S] [--domain D]
    python data_pipeline/main.py export DIR OUT --format megatron|deepspeed|datatrove
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # started as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_pipeline.clean.commands import TRAIN_CLASSIFIER, add_clean_commands, run_clean_command
from data_pipeline.config import DataSettings
from data_pipeline.dataset.commands import add_dataset_commands, run_dataset_command
from data_pipeline.execution.executors import EXECUTORS, open_executor
from data_pipeline.execution.pieces import PieceFailedError
from data_pipeline.execution.progress import Reporter
from data_pipeline.preparation import prepare
from launch.settings import EXIT_FAILED, BadInputError, exit_with_status, load_settings


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="data_pipeline/main.py", description="Raw text to token shards.")
    parser.add_argument("--config", type=Path, help="settings, such as configs/data/demo.json")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one setting")
    parser.add_argument("--executor", choices=EXECUTORS, default="local", help="where pipelines run (default: local)")
    commands = parser.add_subparsers(dest="command", title="instead of preparing")
    add_dataset_commands(commands)
    add_clean_commands(commands)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare a data set or look at one; returns 0, or raises ``BadInputError``."""
    options = parse_arguments(arguments)
    reporter = Reporter()
    if options.command == TRAIN_CLASSIFIER:
        run_clean_command(options, reporter)
        return 0
    if options.command is not None:
        run_dataset_command(options, reporter)
        return 0
    if options.config is None:
        raise BadInputError("--config is required, as in --config configs/data/demo.json")
    settings = load_settings(DataSettings, options.config, options.set)
    try:
        with open_executor(options.executor, settings.execution) as executor:
            prepare(settings, executor, reporter)
    except PieceFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    exit_with_status(main)
