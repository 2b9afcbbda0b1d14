"""Counting what flows and what is dropped, so that every document is accounted for.

A pipeline runs as several tasks in several processes; each task writes its own small JSON file and
:func:`read_tallies` adds them up. A tally is ``{key: {"documents": n, "bytes": utf8_bytes}}``, keyed by
``domain<TAB>source`` for what passes a point, and by ``reason<TAB>domain<TAB>source`` for what was dropped, where the
source is its number in the settings. :func:`tally_by` adds up what a table does not tell apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.execution.document_files import StageWriter

TALLY_INTERVAL_SECONDS = 0.3

Counts = dict[str, int]
Tally = dict[str, Counts]


def add_to_tally(tally: Tally, key: str, size_bytes: int, documents: int = 1) -> None:
    """Count ``documents`` more documents of ``size_bytes`` together under ``key``."""
    counts = tally.setdefault(key, {"documents": 0, "bytes": 0})
    counts["documents"] += documents
    counts["bytes"] += size_bytes


def write_tally(folder: Path, rank: int, tally: Tally) -> None:
    """Write one task's tally; readers see a whole file or the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{rank:05d}.tmp"
    temporary.write_text(json.dumps(tally))
    temporary.replace(folder / f"{rank:05d}.json")


def read_tallies(folder: Path, since: float = 0.0) -> Tally:
    """The sum of all tasks' tallies in ``folder`` written at ``since`` (a file's time) or later; {} without any."""
    total: Tally = {}
    for path in sorted(folder.glob("[0-9]*.json")):
        if path.stat().st_mtime < since:
            continue
        for key, counts in json.loads(path.read_text()).items():
            add_to_tally(total, key, counts["bytes"], counts["documents"])
    return total


def tally_sum(tally: Tally) -> Counts:
    """Documents and bytes of a whole tally."""
    return {unit: sum(counts[unit] for counts in tally.values()) for unit in ("documents", "bytes")}


def place_of(document: Document) -> str:
    """The end of a document's key: its domain and the number of its source, which is empty without an origin."""
    origin = document.metadata.get("origin")
    return f"{document.metadata['domain']}\t{origin['source'] if origin else ''}"


def tally_by(tally: Tally, part: int) -> Tally:
    """The tally with one part of its keys as the key: 0 is the first one, -1 the last, which is the source."""
    result: Tally = {}
    for key, counts in tally.items():
        add_to_tally(result, key.split("\t")[part], counts["bytes"], counts["documents"])
    return result


class CountDocuments(PipelineStep):
    """Counts documents and bytes by domain and source at one point of a pipeline.

    Updated while it runs, for the progress bar.
    """

    name = "Ice tally"
    type = "📊 - TALLY"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass every document on, counted."""
        tally: Tally = {}
        written = time.monotonic()
        for document in data:
            add_to_tally(tally, place_of(document), len(document.text.encode()))
            if time.monotonic() - written > TALLY_INTERVAL_SECONDS:
                write_tally(self.folder, rank, tally)
                written = time.monotonic()
            yield document
        write_tally(self.folder, rank, tally)


class DocumentWriter(StageWriter):
    """Writes one file a task, also when a task has no document: it keeps ranks, files and positions in step."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write each document and pass it on."""
        self.open(rank)
        yield from super().run(data, rank, world_size)


class DroppedWriter(StageWriter):
    """Where filters put what they drop: the documents, for people who ask why, and a tally by reason and place.

    Given ``reason``, every document is dropped for that one (datatrove's de-duplication names none); otherwise the
    filter's own ``filter_reason`` is used.
    """

    def __init__(self, folder: Path, tally_folder: Path, reason: str | None = None) -> None:
        super().__init__(folder)
        self.tally_folder = tally_folder
        self.reason = reason
        self.tally: Tally = {}
        self.rank: int | None = None

    def write(self, document: Document, rank: int = 0, **kwargs: Any) -> None:
        """Write one dropped document and count it."""
        if self.reason:
            document.metadata["filter_reason"] = self.reason
        add_to_tally(
            self.tally, f"{document.metadata['filter_reason']}\t{place_of(document)}", len(document.text.encode())
        )
        self.rank = rank
        super().write(document, rank, **kwargs)

    def close(self) -> None:
        """Close the files and write the tally of this task."""
        super().close()
        if self.rank is not None:
            write_tally(self.tally_folder, self.rank, self.tally)
