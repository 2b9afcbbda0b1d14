"""Between stages: the document files that one stage writes and the next one reads.

These files are ours, so damage in them is an error, never a record to put aside (raw inputs: piece_reader.py). Metadata
is passed on untouched. Every stage writes one file a piece, in order, and every pipeline runs one task a file, so rank
and position identify a document, which is what datatrove's de-duplication relies on.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.inputs.formats import compression_of
from data_pipeline.inputs.jsonl import required_object
from data_pipeline.inputs.parts import BadRecord
from data_pipeline.inputs.streams import StoredFile, cannot_read, decompressed, lines
from launch.settings import BadInputError

DOCUMENTS_SUFFIX = ".jsonl.zst"
# Cleaning has its own, much lower limit; this one bounds memory where a file is not what it seems to be.
MAX_LINE_BYTES = 2**31


@dataclass(frozen=True)
class InputFile:
    """One file of documents: JSON lines, compressed as the name says."""

    path: Path


def stage_files(folder: Path) -> list[InputFile]:
    """The document files that an earlier stage wrote, in rank order."""
    return [InputFile(Path(name)) for name in sorted(glob.glob(f"{glob.escape(str(folder))}/*{DOCUMENTS_SUFFIX}"))]


def read_documents(file: InputFile) -> Iterator[Document]:
    """The documents of one file. Raises ``BadInputError`` for a broken line, a wrong type or damaged compression."""
    try:
        opened = open(file.path, "rb", buffering=0)  # noqa: SIM115 - StoredFile closes it
    except OSError as error:
        raise cannot_read(str(file.path), error) from None
    number = 0
    with StoredFile(opened, str(file.path)) as stored:
        for _, line in lines(decompressed(stored, compression_of(file.path.name)), MAX_LINE_BYTES):
            if isinstance(line, BadRecord):
                raise BadInputError(
                    f"{file.path}: cannot be read after line {number} ({line.problem}); replace the file"
                )
            if line:
                number += 1
                yield _document(line, file.path, number)


def _document(line: bytes, path: Path, number: int) -> Document:
    values = required_object(line, f"{path}: line {number}", "a 'text'")
    text = values.get("text") or ""
    if not isinstance(text, str):
        raise BadInputError(f"{path}: line {number}: 'text' is not a string")
    metadata = values.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise BadInputError(f"{path}: line {number}: 'metadata' is not an object")
    # Files of stages name both; files that people make by hand need not.
    domain = metadata.setdefault("domain", "text")
    metadata.setdefault("source", path.name.split(".")[0])
    if not isinstance(domain, str):
        raise BadInputError(f"{path}: line {number}: the domain is not a string")
    identity = values.get("id")
    return Document(text=text, id=f"{path.name}/{number}" if identity is None else str(identity), metadata=metadata)


class DocumentReader(PipelineStep):
    """First step of a pipeline: the documents of this task's files."""

    name = "Ice documents"
    type = "📖 - READER"

    def __init__(self, files: Sequence[InputFile]) -> None:
        super().__init__()
        self.files = list(files)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of ``files[rank::world_size]``."""
        for file in self.files[rank::world_size]:
            yield from read_documents(file)
