"""``verify``, ``inspect`` and ``export``: what ``python data_pipeline/main.py`` does with a prepared data set.

The work is in :mod:`reader`, :mod:`inspection` and :mod:`export`, imported when a command needs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.execution.progress import Reporter
from launch.settings import BadInputError

FORMATS = ("megatron", "deepspeed", "datatrove")
SHOWN_DOCUMENTS = 5


def add_dataset_commands(commands: Any) -> None:
    """Declare the three commands; ``commands`` is what ``add_subparsers`` returned."""
    command = commands.add_parser("verify", help="check every hash of a prepared data set")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("inspect", help="show what a data set holds, or documents of it, decoded")
    command.add_argument("folder", type=Path)
    command.add_argument("--split", choices=("train", "validation"), help="whose documents (default: train)")
    command.add_argument("--document", type=int, metavar="N", help="document N of the split, counted from 0")
    command.add_argument("--search", metavar="TEXT", help="documents that contain TEXT")
    command.add_argument("--domain", metavar="NAME", help="documents of one domain")
    command.add_argument("--limit", type=int, default=SHOWN_DOCUMENTS, help=f"at most (default: {SHOWN_DOCUMENTS})")
    command = commands.add_parser("export", help="write a copy for another program")
    command.add_argument("folder", type=Path)
    command.add_argument("output", type=Path, help="a new folder")
    command.add_argument("--format", choices=FORMATS, required=True)


def run_dataset_command(options: argparse.Namespace, reporter: Reporter) -> None:
    """Do one of the commands; ``BadInputError`` names the file or option that is wrong."""
    {"verify": _verify, "inspect": _inspect, "export": _export}[options.command](options, reporter)


def _verify(options: argparse.Namespace, reporter: Reporter) -> None:
    from data_pipeline.dataset.reader import open_dataset

    dataset = open_dataset(options.folder, verify=True)
    dataset.tokenizer.byte_lengths()  # loads the tokenizer, and all of its pieces
    tokens = sum(stream.total_tokens for stream in dataset.streams.values())
    files = dataset.manifest.files()
    reporter.line(
        "verified",
        f"{options.folder}: {len(files)} files, {sum(entry.bytes for entry in files):,} bytes, {tokens:,} tokens, "
        f"fingerprint {dataset.fingerprint[:16]}",
    )


def _inspect(options: argparse.Namespace, reporter: Reporter) -> None:
    from data_pipeline.dataset import inspection
    from data_pipeline.dataset.reader import open_dataset

    dataset = open_dataset(options.folder)
    console = Console(file=reporter.console.file, highlight=False)  # the reporter's own does not fold lines
    if options.document is None and options.search is None and options.domain is None and options.split is None:
        inspection.print_summary(console, dataset)
        return
    split = options.split or "train"
    if options.document is not None:
        inspection.print_document(console, inspection.document(dataset, split, options.document))
        return
    shown = 0
    for found in inspection.documents(dataset, split, options.domain, options.search):
        if shown == options.limit:
            reporter.line("more", f"only the first {shown} are shown; see --limit")
            return
        inspection.print_document(console, found, options.search)
        shown += 1
    if not shown:
        raise BadInputError(f"--search {options.search!r}: no document of {split} contains it")


def _export(options: argparse.Namespace, reporter: Reporter) -> None:
    from data_pipeline.dataset.export import export_dataset
    from data_pipeline.dataset.reader import open_dataset

    description = export_dataset(open_dataset(options.folder), options.output, options.format)
    size = sum(file["bytes"] for file in description["files"])
    reporter.line(
        "exported", f"{options.output}: {len(description['files'])} files, {size:,} bytes of {description['dtype']}"
    )
