"""Documents in: strict readers of JSON lines.

datatrove's own ``JsonlReader`` logs a warning for a broken line, skips it and goes on; here bad input stops the run
with its file and line. Documents without text are passed on, so that the quality stage drops them under a name.

Files are dealt to tasks as ``files[rank::world_size]``; every pipeline here runs one task a file, so rank and
position identify a document, which is what datatrove's de-duplication relies on.
"""

from __future__ import annotations

import glob
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec  # type: ignore[import-untyped]
import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import SourceSettings
from launch.settings import BadInputError

DOCUMENTS_SUFFIX = ".jsonl.zst"
READ_BYTES = 1 << 18


@dataclass(frozen=True)
class InputFile:
    """One file of documents and what to assume about them."""

    path: Path
    domain: str = "text"
    text_key: str = "text"
    id_key: str = "id"


def find_source_files(sources: Sequence[SourceSettings]) -> list[InputFile]:
    """Every file of every source, sorted within a source; a missing or empty source is a ``BadInputError``."""
    files = []
    for index, source in enumerate(sources):
        folder = Path(source.path)
        if not folder.is_dir():
            raise BadInputError(
                f"sources.{index}.path = {source.path!r}: no such folder; give the folder that holds the corpus "
                "(relative paths start at the current folder)"
            )
        found = sorted(path for path in folder.glob(source.pattern) if path.is_file())
        if not found:
            raise BadInputError(
                f"sources.{index}.pattern = {source.pattern!r}: matches no file in {folder}; "
                "expected JSON-lines files such as NAME.jsonl.xz"
            )
        files += [InputFile(path, source.domain, source.text_key, source.id_key) for path in found]
    return files


def stage_files(folder: Path) -> list[InputFile]:
    """The document files that an earlier stage wrote, in rank order."""
    return [InputFile(Path(name)) for name in sorted(glob.glob(f"{glob.escape(str(folder))}/*{DOCUMENTS_SUFFIX}"))]


def read_documents(file: InputFile) -> Iterator[Document]:
    """The documents of one file. Raises ``BadInputError`` for a broken line, a wrong type or damaged compression."""
    number = 0
    try:
        # fsspec's Zstandard reader stops, silently, after the first frame and at a truncation; this one does not.
        compression = None if file.path.suffix == ".zst" else "infer"
        with fsspec.open(str(file.path), "rb", compression=compression) as content:
            lines = content if compression else _lines(_zstd_chunks(content))
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(line, file, number)
    except (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise BadInputError(f"{file.path}: cannot be read after line {number} ({error}); replace the file") from None


def _zstd_chunks(content: BinaryIO) -> Iterator[bytes]:
    decompressor: Any = None
    while chunk := content.read(READ_BYTES):
        while chunk:
            decompressor = decompressor or zstandard.ZstdDecompressor().decompressobj()
            yield decompressor.decompress(chunk)
            chunk = decompressor.unused_data
            if decompressor.eof:
                decompressor = None
    if decompressor is not None:
        raise EOFError("the file ends inside a Zstandard frame")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _document(line: bytes, file: InputFile, number: int) -> Document:
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadInputError(f"{file.path}: line {number}: not JSON ({error}); correct or remove the line") from None
    if not isinstance(values, dict):
        raise BadInputError(f"{file.path}: line {number}: not an object with a {file.text_key!r}")
    text = values.get(file.text_key) or ""
    if not isinstance(text, str):
        raise BadInputError(f"{file.path}: line {number}: {file.text_key!r} is not a string")
    given = values.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    domain = metadata.get("domain") or values.get("domain") or file.domain
    if not isinstance(domain, str):
        raise BadInputError(f"{file.path}: line {number}: the domain is not a string")
    source = metadata.get("source") or values.get("source") or file.path.name.split(".")[0]
    identity = values.get(file.id_key)
    if identity is None:
        identity = f"{file.path.name}/{number}"
    return Document(text=text, id=str(identity), metadata={"domain": domain, "source": str(source)})


class DocumentReader(PipelineStep):
    """First step of a pipeline: the documents of this task's files."""

    name = "Ice documents"
    type = "📖 - READER"

    def __init__(self, files: Sequence[InputFile]) -> None:
        super().__init__()
        self.files = list(files)

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents of ``files[rank::world_size]``, after any that come in."""
        if data:
            yield from data
        for file in self.files[rank::world_size]:
            for document in read_documents(file):
                self.update_doc_stats(document)
                yield document
