"""A shard: whole documents as raw tokens, and three small files that say what the tokens are. Little-endian throughout.

================  ==========================================================================================
``X.bin``         tokens, uint16 or uint32 (the smallest that holds the vocabulary), an end token after every document
``X.bin.index``   uint64 for each document: the position after its end token. datatrove's ``.ds.index``
``X.documents``   24 bytes for each document, :data:`DOCUMENT`: size of its text, domain, and where it came from
``X.idx``         Megatron's index of the same ``.bin`` (``megatron.py``)
``X.json``        while preparing only: sizes, hashes and counts of the four, for the manifest; written last
================  ==========================================================================================

The payload has no header, which is what lets Megatron, DeepSpeed and datatrove read it in place. The four files
determine each other's sizes, so a truncation shows when a shard is opened.

The writer streams: its memory does not grow with the shard, and files are hashed while they are written. Stages write
one shard for each piece of work; :mod:`data_pipeline.dataset.merge` makes the published ones of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import megatron
from data_pipeline.dataset.manifest import SHARD_SUFFIXES, ShardEntry
from launch.settings import BadInputError

DOCUMENT = np.dtype([("utf8_bytes", "<u8"), ("position", "<u8"), ("file", "<u4"), ("source", "<u2"), ("domain", "<u2")])
"""One record of ``X.documents``; ``source`` and ``file`` are indices into the data set's ``sources.json``."""

UNKNOWN_SOURCE = 2**16 - 1
MAX_DOMAINS = 2**16
COPY_TOKENS = 1 << 21
COPY_DOCUMENTS = 1 << 16


class Origin(NamedTuple):
    """Where a raw document was read: see the metadata ``origin`` that the readers write."""

    source: int
    file: int
    position: int


UNKNOWN_ORIGIN = Origin(UNKNOWN_SOURCE, 0, 0)


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest token type that holds ids below ``vocab_size``: little-endian uint16 or uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def shard_file(path: Path, kind: str) -> Path:
    """The shard's file of one kind (a key of ``SHARD_SUFFIXES``); ``path`` is its ``.bin``."""
    return path.with_name(path.name.removesuffix(".bin") + SHARD_SUFFIXES[kind])


class HashedFile:
    """A file that is written once, front to back, and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")

    def write(self, content: bytes | memoryview) -> None:
        """Append ``content``."""
        self._file.write(content)
        self._sha256.update(content)
        self.bytes += len(content)

    def write_array(self, values: NDArray[Any]) -> None:
        """Append an array's bytes."""
        self.write(values.tobytes())

    def flush(self) -> None:
        """Hand what was written to the system, so that the file can be read."""
        self._file.flush()

    def close(self) -> dict[str, Any]:
        """Returns the file's name, size and hash as the manifest has them."""
        self._file.close()
        return {"file": self.path.name, "bytes": self.bytes, "sha256": self._sha256.hexdigest()}

    def discard(self) -> None:
        """Close it without a word about what could not be written: its writing has failed already."""
        try:
            self._file.close()
        except OSError:
            return


class ShardWriter:
    """Writes one shard. Its description comes last, so a shard that was not finished cannot be opened."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path.with_suffix(".bin")
        self.vocab_size = vocab_size
        self.dtype = dtype_for(vocab_size)
        self.tokens = 0
        self.documents = 0
        self._by_domain = np.zeros((0, 3), dtype=np.int64)
        kinds = ("tokens", "document_ends", "documents")
        self._files = {kind: HashedFile(shard_file(self.path, kind)) for kind in kinds}

    def add(self, ids: Sequence[int], utf8_bytes: int, domain_id: int, origin: Origin = UNKNOWN_ORIGIN) -> None:
        """Append one document's tokens, the end token included."""
        record = np.asarray([(utf8_bytes, origin.position, origin.file, origin.source, domain_id)], dtype=DOCUMENT)
        self.append(np.asarray(ids, dtype=np.int64), np.asarray([len(ids)]), record)

    def append(self, ids: NDArray[Any], lengths: NDArray[Any], documents: NDArray[Any]) -> None:
        """Append documents: their tokens one after the other, how many each has, and their records.

        Raises ``ValueError`` for ids outside the vocabulary, empty documents, and lengths that do not add up.
        """
        if lengths.size == 0 or lengths.min() < 1 or lengths.max() > megatron.MAX_LENGTH or lengths.sum() != ids.size:
            raise ValueError("token ids must be there for every document: 1 to 2^31 - 1 each, adding up to all")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size})")
        self._files["tokens"].write_array(ids.astype(self.dtype, copy=False))
        self._append_records(lengths, documents)

    def copy(self, shard: Shard, first: int, last: int) -> None:
        """Append documents ``[first, last)`` of another shard, reading a few megabytes at a time."""
        begin = int(shard.document_ends[first - 1]) if first else 0
        end = int(shard.document_ends[last - 1])
        with shard.path.open("rb") as file:
            file.seek(begin * self.dtype.itemsize)
            for start in range(begin, end, COPY_TOKENS):
                tokens = np.fromfile(file, dtype=self.dtype, count=min(COPY_TOKENS, end - start))
                self._files["tokens"].write_array(tokens)
        before = begin
        for start in range(first, last, COPY_DOCUMENTS):
            stop = min(start + COPY_DOCUMENTS, last)
            ends = shard.document_ends[start:stop].astype(np.int64)
            self._append_records(np.diff(ends, prepend=before), shard.documents[start:stop])
            before = int(ends[-1])

    def _append_records(self, lengths: NDArray[Any], documents: NDArray[Any]) -> None:
        ends = self.tokens + np.cumsum(lengths, dtype=np.int64)
        self._files["document_ends"].write_array(ends.astype("<u8"))
        self._files["documents"].write_array(documents)
        self.tokens = int(ends[-1])
        self.documents += lengths.size
        domains = documents["domain"].astype(np.int64)
        missing = int(domains.max()) + 1 - len(self._by_domain)
        self._by_domain = np.pad(self._by_domain, ((0, max(missing, 0)), (0, 0)))
        sizes = documents["utf8_bytes"].astype(np.int64)
        np.add.at(self._by_domain, domains, np.stack([lengths, np.ones_like(lengths), sizes], axis=1))

    def close(self) -> None:
        """Write Megatron's index and the description. Who records the shard as finished flushes it to the disk."""
        self._files["document_ends"].flush()
        index = HashedFile(shard_file(self.path, "megatron_index"))
        ends = np.empty(0, dtype="<u8")
        if self.documents:
            ends = np.memmap(shard_file(self.path, "document_ends"), dtype="<u8", mode="r")
        for chunk in megatron.index_chunks(ends, self.dtype.name):
            index.write(chunk)
        files = {kind: file.close() for kind, file in (*self._files.items(), ("megatron_index", index))}
        counts = {"tokens": self.tokens, "documents": self.documents, "utf8_bytes": int(self._by_domain[:, 2].sum())}
        description = {"entry": {"files": files, **counts}, "by_domain": self._by_domain.tolist()}
        description_file(self.path).write_text(json.dumps(description))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            for file in self._files.values():
                file.discard()


def description_file(path: Path) -> Path:
    """The writer's description of the shard whose ``.bin`` is ``path``."""
    return path.with_suffix(".json")


@dataclass(frozen=True)
class Description:
    """What a writer says about a finished shard: the manifest's entry, and counts by domain id.

    A row of ``by_domain`` is tokens, documents, bytes of text; ids past the last row have none.
    """

    entry: ShardEntry
    by_domain: NDArray[np.int64]


def read_description(path: Path) -> Description:
    """The description of the shard whose ``.bin`` is ``path``; a missing one means an unfinished shard."""
    try:
        values = json.loads(description_file(path).read_text())
    except FileNotFoundError:
        raise BadInputError(
            f"{path}: has no description: its writing was cut off; prepare the data set again"
        ) from None
    rows = np.asarray(values["by_domain"], dtype=np.int64).reshape(-1, 3)
    return Description(ShardEntry.model_validate(values["entry"]), rows)


def written_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of the finished shards in ``folder``, by name, as their writers computed them."""
    entries = [read_description(path).entry for path in sorted(folder.glob("*.bin"))]
    files = [getattr(entry.files, kind) for entry in entries for kind in SHARD_SUFFIXES]
    return {file.file: file.sha256 for file in files}


@dataclass(frozen=True)
class Shard:
    """An open shard; arrays are memory-mapped and read-only. ``path`` is its ``.bin``.

    ``tokens`` (tokens,) uint16 or uint32; ``document_ends`` (documents,); ``documents`` (documents,) of ``DOCUMENT``.
    """

    path: Path
    tokens: NDArray[Any]
    document_ends: NDArray[np.uint64]
    documents: NDArray[Any]

    @property
    def dtype(self) -> str:
        """The type of a token, ``"uint16"`` or ``"uint32"``."""
        return self.tokens.dtype.name

    @property
    def utf8_bytes(self) -> NDArray[np.uint64]:
        """The size of each document's text, (documents,)."""
        sizes: NDArray[np.uint64] = self.documents["utf8_bytes"]
        return sizes

    @property
    def domain_ids(self) -> NDArray[np.uint16]:
        """The domain of each document, (documents,): an index into the manifest's ``domains``."""
        domains: NDArray[np.uint16] = self.documents["domain"]
        return domains

    @property
    def origins(self) -> NDArray[Any]:
        """Where each document came from, (documents,): fields ``source``, ``file``, ``position``."""
        return self.documents[["source", "file", "position"]]

    def document(self, index: int) -> NDArray[Any]:
        """Tokens of one document, the end token included."""
        start = int(self.document_ends[index - 1]) if index else 0
        return self.tokens[start : int(self.document_ends[index])]


def open_shard(path: Path) -> Shard:
    """Map the shard whose ``.bin`` is ``path``; ``BadInputError`` for a missing, truncated or foreign file.

    The cost does not grow with the shard; :func:`check_shard` reads all of it.
    """
    sizes, index_path = {}, shard_file(path, "megatron_index")
    for kind in SHARD_SUFFIXES:
        file = shard_file(path, kind)
        try:
            sizes[kind] = file.stat().st_size
            if kind == "megatron_index":
                with file.open("rb") as content:
                    header = content.read(megatron.HEADER.size)
        except OSError as error:
            raise _bad(file, f"cannot be read ({error.strerror})") from None
    try:
        dtype, documents = megatron.read_header(header)
    except ValueError as error:
        raise _bad(index_path, f"bad header: {error}") from None
    if not documents:
        raise _bad(index_path, "bad header: no documents")
    expected = {
        "megatron_index": megatron.index_size(documents),
        "document_ends": 8 * documents,
        "documents": DOCUMENT.itemsize * documents,
    }
    for kind, size in expected.items():
        if sizes[kind] != size:
            problem = "truncated" if sizes[kind] < size else "wrong size"
            raise _bad(shard_file(path, kind), f"{problem}: {sizes[kind]} bytes, {documents} documents need {size}")
    ends = np.memmap(shard_file(path, "document_ends"), dtype="<u8", mode="r")
    size = int(ends[-1]) * np.dtype(dtype).itemsize
    if sizes["tokens"] != size or not size:
        problem = "truncated" if sizes["tokens"] < size else "wrong size"
        raise _bad(path, f"{problem}: {sizes['tokens']} bytes, its document ends need {size}")
    tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    return Shard(path, tokens, ends, np.memmap(shard_file(path, "documents"), dtype=DOCUMENT, mode="r"))


def check_shard(shard: Shard, vocab_size: int, domains: int) -> None:
    """Read all of a shard: boundaries rise, ids and domains exist, Megatron's index is this shard's.

    Raises ``BadInputError`` that names the file.
    """
    ends_path, index_path = shard_file(shard.path, "document_ends"), shard_file(shard.path, "megatron_index")
    before = 0
    for start in range(0, shard.document_ends.size, COPY_DOCUMENTS):
        ends = shard.document_ends[start : start + COPY_DOCUMENTS]
        if int(ends[0]) <= before or bool((ends[1:] <= ends[:-1]).any()):
            raise _bad(ends_path, "document boundaries do not rise to the number of tokens")
        if int(shard.domain_ids[start : start + COPY_DOCUMENTS].max()) >= domains:
            raise _bad(shard_file(shard.path, "documents"), "a domain id is not one of the manifest's")
        before = int(ends[-1])
    for start in range(0, shard.tokens.size, COPY_TOKENS):
        if int(shard.tokens[start : start + COPY_TOKENS].max()) >= vocab_size:
            raise _bad(shard.path, f"a token id is not below vocab_size = {vocab_size}")
    with index_path.open("rb") as content:
        for chunk in megatron.index_chunks(shard.document_ends, shard.dtype):
            if content.read(len(chunk)) != chunk:
                raise _bad(index_path, "does not describe the documents of its shard")


def _bad(path: Path, problem: str) -> BadInputError:
    return BadInputError(f"{path}: {problem}; prepare the data set again")
