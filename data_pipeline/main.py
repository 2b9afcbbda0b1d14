"""Raw text to token shards: ``python data_pipeline/main.py --config configs/data/demo.json``.

The stages, in order, and what each hands on::

    clean      Unicode, whitespace, length, quality       documents
    exact      identical texts                            documents
    minhash    nearly identical texts                     documents
    split      train or validation, by hash of the text   documents of each split
    tokenizer  SentencePiece BPE on training text         tokenizer.model
    shards     tokens, boundaries, domains                shards of each split
    publish    files into place, manifest last            the data set

Running it again skips what is finished. ``python data_pipeline/main.py verify DIR`` checks a data set's every hash.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # started as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_pipeline.config import DataSettings
from data_pipeline.execution.executors import EXECUTORS, create_executor
from data_pipeline.execution.progress import Reporter
from data_pipeline.preparation import prepare
from launch.settings import BadInputError, exit_with_status, load_settings


def verify(folder: Path, reporter: Reporter) -> None:
    """Check every hash, header and token id of a data set; ``BadInputError`` names the first file that is wrong."""
    from data_pipeline.dataset.reader import open_dataset

    dataset = open_dataset(folder, verify=True)
    tokens = sum(stream.total_tokens for stream in dataset.streams.values())
    reporter.line("verified", f"{folder}: {tokens:,} tokens, fingerprint {dataset.fingerprint[:16]}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="data_pipeline/main.py", description="Raw text to token shards.")
    parser.add_argument("--config", type=Path, help="settings, such as configs/data/demo.json")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one setting")
    parser.add_argument("--executor", choices=EXECUTORS, default="local", help="where pipelines run (default: local)")
    commands = parser.add_subparsers(dest="command", title="instead of preparing")
    command = commands.add_parser("verify", help="check every hash of a prepared data set")
    command.add_argument("folder", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare or verify a data set; returns 0, or raises ``BadInputError``."""
    options = parse_arguments(arguments)
    reporter = Reporter()
    if options.command == "verify":
        verify(options.folder, reporter)
        return 0
    if options.config is None:
        raise BadInputError("--config is required, as in --config configs/data/demo.json")
    settings = load_settings(DataSettings, options.config, options.set)
    prepare(settings, create_executor(options.executor, settings.execution.workers), reporter)
    return 0


if __name__ == "__main__":
    exit_with_status(main)
