r"""The shard file: tokens of whole documents, memory-mapped, with their boundaries, domains and sizes.

Little-endian throughout::

    header        64 bytes: magic "ICESHARD", version u32, dtype code u32, vocab_size u64, tokens u64, documents u64
    tokens        uint16 or uint32 (dtype code 1 or 2), every document followed by its end token, zeros to 8 bytes
    document_ends uint64 each: the position after a document's end token; the last one equals ``tokens``
    utf8_bytes    uint64 each: the size of the document's text, for bits-per-byte
    domain_ids    uint16 each: an index into the manifest's ``domains``

The size of the file follows from the header, so truncation shows when it is opened. The dtype is the smallest that
holds the vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched
from numpy.typing import NDArray

from data_pipeline.config import ShardSettings
from data_pipeline.execution.tally import CountDocuments
from data_pipeline.inputs.readers import DocumentReader, InputFile
from data_pipeline.tokenizer.bpe import Tokenizer
from launch.files import fsync_path
from launch.settings import BadInputError

MAGIC = b"ICESHARD"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQ24x")
DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<u2"), 2: np.dtype("<u4")}
DOCUMENTS_PER_BATCH = 256


def dtype_code_for(vocab_size: int) -> int:
    """The code of the smallest token type that holds ids below ``vocab_size``."""
    return 1 if vocab_size <= 2**16 else 2


def dtype_name(code: int) -> str:
    """``"uint16"`` or ``"uint32"``."""
    return DTYPES[code].name


class ShardWriter:
    """Writes one shard; the header comes last, so a file that was not finished has no magic and cannot be opened."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self.code = dtype_code_for(vocab_size)
        self.tokens = 0
        self._ends: list[int] = []
        self._utf8_bytes: list[int] = []
        self._domain_ids: list[int] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(HEADER.size))

    def add(self, ids: Sequence[int], utf8_bytes: int, domain_id: int) -> None:
        """Append one document's tokens, the end token included."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size == 0 or array.min() < 0 or array.max() >= self.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size}) and a document must have at least one")
        self._file.write(array.astype(DTYPES[self.code]).tobytes())
        self.tokens += array.size
        self._ends.append(self.tokens)
        self._utf8_bytes.append(utf8_bytes)
        self._domain_ids.append(domain_id)

    def close(self) -> None:
        """Write the index and the header, and flush to the disk."""
        self._file.write(bytes(-self._file.tell() % 8))
        self._file.write(np.asarray(self._ends, dtype="<u8").tobytes())
        self._file.write(np.asarray(self._utf8_bytes, dtype="<u8").tobytes())
        self._file.write(np.asarray(self._domain_ids, dtype="<u2").tobytes())
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self.code, self.vocab_size, self.tokens, len(self._ends)))
        self._file.close()
        fsync_path(self.path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


@dataclass(frozen=True)
class Shard:
    """An open shard; arrays are memory-mapped and read-only."""

    path: Path
    vocab_size: int
    tokens: NDArray[Any]
    document_ends: NDArray[np.uint64]
    utf8_bytes: NDArray[np.uint64]
    domain_ids: NDArray[np.uint16]

    @property
    def dtype(self) -> str:
        """The type of a token, ``"uint16"`` or ``"uint32"``."""
        return self.tokens.dtype.name

    def document(self, index: int) -> NDArray[Any]:
        """Tokens of one document, the end token included."""
        start = int(self.document_ends[index - 1]) if index else 0
        return self.tokens[start : int(self.document_ends[index])]


def open_shard(path: Path) -> Shard:
    """Map a shard. Raises ``BadInputError`` for a missing, truncated, foreign or inconsistent file."""

    def bad(problem: str) -> BadInputError:
        return BadInputError(f"{path}: {problem}; prepare the data set again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except OSError as error:
        raise bad(f"cannot be read ({error.strerror})") from None
    if len(header) < HEADER.size:
        raise bad(f"truncated: {size} bytes, shorter than the header")
    magic, version, code, vocab_size, tokens, documents = HEADER.unpack(header)
    if magic != MAGIC:
        raise bad("bad header: not an Ice shard, or one whose writing was cut off")
    if version != VERSION:
        raise bad(f"bad header: version {version}, this program reads {VERSION}")
    if code not in DTYPES or not 0 < vocab_size <= 2 ** (8 * DTYPES[code].itemsize):
        raise bad(f"bad header: dtype code {code} with a vocabulary of {vocab_size}")
    token_bytes = tokens * DTYPES[code].itemsize
    ends_at = HEADER.size + token_bytes + -(HEADER.size + token_bytes) % 8
    expected = ends_at + documents * (8 + 8 + 2)
    if size != expected:
        problem = "truncated" if size < expected else "wrong size"
        raise bad(f"{problem}: {size} bytes where the header promises {expected}")
    if not documents or not tokens:
        raise bad("bad header: no documents")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    shard = Shard(
        path=path,
        vocab_size=vocab_size,
        tokens=content[HEADER.size : HEADER.size + token_bytes].view(DTYPES[code]),
        document_ends=content[ends_at : ends_at + 8 * documents].view("<u8"),
        utf8_bytes=content[ends_at + 8 * documents : ends_at + 16 * documents].view("<u8"),
        domain_ids=content[ends_at + 16 * documents :].view("<u2"),
    )
    ends = shard.document_ends
    if int(ends[-1]) != tokens or int(ends[0]) == 0 or bool((ends[1:] <= ends[:-1]).any()):
        raise bad("document boundaries do not rise to the number of tokens")
    return shard


class WriteShards(PipelineStep):
    """Last step of a pipeline: tokenises this task's documents into ``folder/RANK_NUMBER.tokens``."""

    name = "Ice shards"
    type = "🔢 - TOKENIZER"

    def __init__(self, folder: Path, tokenizer_path: Path, domains: Sequence[str], settings: ShardSettings) -> None:
        super().__init__()
        self.folder = folder
        self.tokenizer_path = tokenizer_path
        self.domain_ids = {domain: index for index, domain in enumerate(domains)}
        self.settings = settings

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write shards, pass the documents on."""
        tokenizer = Tokenizer.load(self.tokenizer_path)
        writer: ShardWriter | None = None
        number = 0
        for batch in batched(data, DOCUMENTS_PER_BATCH):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                if writer is None:
                    writer = ShardWriter(self.folder / f"{rank:05d}_{number:05d}.tokens", tokenizer.vocab_size)
                domain_id = self.domain_ids[document.metadata["domain"]]
                writer.add([*ids, tokenizer.end_id], len(document.text.encode()), domain_id)
                if writer.tokens >= self.settings.max_tokens:
                    writer.close()
                    writer, number = None, number + 1
                yield document
        if writer is not None:
            writer.close()


def shard_pipeline(
    files: Sequence[InputFile],
    folder: Path,
    split: str,
    tokenizer_path: Path,
    domains: Sequence[str],
    settings: ShardSettings,
) -> list[PipelineStep]:
    """Documents of one split to shards in ``folder/SPLIT``; one task a file."""
    return [
        DocumentReader(files),
        CountDocuments(folder / "tallies" / split),
        WriteShards(folder / split, tokenizer_path, domains, settings),
    ]
