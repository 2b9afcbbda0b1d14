"""Bytes in: files on any file system, decompressed piece by piece, cut into lines; memory is bounded whatever comes.

- Whatever the compression ratio, at most ``READ_BYTES`` are decompressed at a time: a small file of a billion newlines
  costs time, not memory.
- A truncated or damaged file is an error at the place of the damage. (fsspec's Zstandard reader, and so datatrove's,
  stops silently after the first frame and at a truncation; pyarrow's does not.)
- A line longer than the limit is passed over without being kept.

Reading fails in two ways, which are not to be confused. The *storage* can fail: the file is gone, may not be read, has
another size than when the work was planned. That is ``BadInputError``, and ends the job. Or the *bytes* can be wrong:
that is :class:`DamagedError`, which readers turn into a bad record.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from data_pipeline.inputs.parts import DAMAGED, EXCERPT_BYTES, BadRecord, Compression, Part, excerpt_of
from launch.settings import BadInputError

READ_BYTES = 1 << 20
# A decoder that meets damage loses what it had decoded for the current read; small reads lose little.
DECODED_READ_BYTES = 1 << 17


class DamagedError(Exception):
    """The stored bytes cannot be decoded any further; the message says why."""


class StoredFile(io.RawIOBase):
    """An open file whose failures to be read are ``BadInputError``, so that no decoder takes them for damage."""

    def __init__(self, file: BinaryIO, shown: str) -> None:
        super().__init__()
        self._file = file
        self._shown = shown

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes, as every file that fsspec opens for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer`` as far as the file goes."""
        try:
            content = self._file.read(len(buffer))
        except OSError as error:
            raise cannot_read(self._shown, error) from None
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The current byte."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def cannot_read(shown: str, error: OSError) -> BadInputError:
    """The one line about a file that the storage does not give."""
    problem = error.strerror or str(error) or type(error).__name__
    return BadInputError(f"{shown}: cannot be read ({problem}); restore the file, or take it out of the source")


def open_part(part: Part) -> StoredFile:
    """Open a part's file at its beginning. ``BadInputError`` when it is gone, unreadable or no longer the same size."""
    shown = f"sources.{part.source}: {part.path}"
    try:
        file_system, _ = fsspec.core.url_to_fs(part.url)
        if isinstance(file_system, LocalFileSystem):
            file = cast(BinaryIO, open(part.path, "rb", buffering=0))  # noqa: SIM115 - StoredFile closes it
        else:
            file = file_system.open(part.path, "rb", block_size=READ_BYTES)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
    except OSError as error:
        raise cannot_read(shown, error) from None
    if size != part.stored_bytes:
        file.close()
        raise BadInputError(
            f"{shown}: has {size} bytes, and had {part.stored_bytes} when the run began; "
            "leave inputs alone during a run"
        )
    return StoredFile(file, shown)


def decompressed(stored: StoredFile, compression: Compression | None) -> Iterator[bytes]:
    """The content in chunks of at most ``READ_BYTES``, none of them empty; raises :class:`DamagedError`."""
    if compression is None:
        while chunk := stored.read(READ_BYTES):
            yield chunk
        return
    empty = True
    try:
        stream = _decoder(stored, compression)
        while chunk := stream(DECODED_READ_BYTES):
            empty = False
            yield chunk
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise DamagedError(f"the {compression} data is damaged: {error}") from None
    if empty and stored.tell() == 0:
        raise DamagedError(f"an empty file is not {compression} data")


def _decoder(stored: StoredFile, compression: Compression) -> Any:
    # read1 gives what is there instead of going on until so many bytes are.
    match compression:
        case "gz":
            return gzip.GzipFile(fileobj=stored).read1
        case "xz":
            return lzma.LZMAFile(cast(BinaryIO, stored)).read1
        case "bz2":
            return bz2.BZ2File(stored).read1
        case "zst":
            return pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd").read


def whole(chunks: Iterator[bytes], max_bytes: int) -> bytes | BadRecord:
    """All of a file that is one document, or a ``too_large`` or ``damaged`` record; never more than that is loaded."""
    content = bytearray()
    try:
        for chunk in chunks:
            content += chunk
            if len(content) > max_bytes:
                return BadRecord(0, "too_large", too_large(max_bytes), len(content), excerpt_of(content))
    except DamagedError as error:
        return BadRecord(0, DAMAGED, str(error), len(content), excerpt_of(content))
    return bytes(content)


def too_large(max_bytes: int) -> str:
    """What a bad record says that is over the limit."""
    return f"is larger than inputs.max_document_bytes = {max_bytes}"


def lines(
    chunks: Iterator[bytes], max_bytes: int, offset: int = 0, skip_first: bool = False
) -> Iterator[tuple[int, bytes | BadRecord]]:
    r"""Each line with the offset of its first byte, without its newline; lines without content may be left out.

    Lines end at ``\n``. A line over ``max_bytes`` and the damage where the content ends too early come as bad records.

    Args:
        chunks: The content from ``offset`` on.
        max_bytes: The longest line.
        offset: Where the content begins.
        skip_first: Begin after the first newline.
    """
    begun = _Line(max_bytes)
    try:
        for chunk in chunks:
            if skip_first:
                cut = chunk.find(b"\n") + 1
                offset += cut or len(chunk)
                if not cut:
                    # Nothing begins here, but the caller decides by the offset whether to look any further.
                    yield offset, b""
                    continue
                chunk, skip_first = chunk[cut:], False
            if not begun.size and chunk.isspace():
                cut = chunk.rfind(b"\n") + 1
                offset, chunk = offset + cut, chunk[cut:]
            *complete, rest = chunk.split(b"\n")
            if complete and begun.size:
                begun.add(complete.pop(0))
                yield offset, begun.content(offset)
                offset += begun.size + 1
                begun = _Line(max_bytes)
            for line in complete:
                if len(line) <= max_bytes:
                    yield offset, line
                else:
                    long = _Line(max_bytes)
                    long.add(line)
                    yield offset, long.content(offset)
                offset += len(line) + 1
            if rest:
                begun.add(rest)
    except DamagedError as error:
        yield offset, BadRecord(offset, DAMAGED, str(error), begun.size, begun.excerpt, loses_rest=True)
        return
    if begun.size:
        yield offset, begun.content(offset)


class _Line:
    """A line that comes in parts; beyond the limit, only its beginning is kept."""

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._blank = True

    def add(self, part: bytes) -> None:
        self.size += len(part)
        self._blank = self._blank and (not part or part.isspace())
        if self.size <= self._max_bytes:
            self._parts.append(part)
        else:
            self._parts = [self._parts[0] if self._parts else part[:EXCERPT_BYTES]]

    @property
    def excerpt(self) -> str:
        return excerpt_of(self._parts[0]) if self._parts else ""

    def content(self, offset: int) -> bytes | BadRecord:
        if self._blank:
            return b""
        if self.size > self._max_bytes:
            return BadRecord(offset, "too_large", too_large(self._max_bytes), self.size, self.excerpt)
        return b"".join(self._parts)
