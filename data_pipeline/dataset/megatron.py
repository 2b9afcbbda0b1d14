r"""Megatron's index file (``.idx``): where each document of a ``.bin`` of raw tokens begins and ends.

Little-endian throughout (megatron/core/datasets/indexed_dataset.py; the same layout as fairseq's and DeepSpeed's)::

    magic         9 bytes: "MMIDIDX\0\0"
    version       u64: 1
    dtype code    u8: 8 for uint16, 4 for int32
    sequences     u64: n, one a document here
    documents     u64: n + 1
    lengths       n int32: tokens of each sequence
    pointers      n int64: the byte in the ``.bin`` where each sequence begins
    documents     n + 1 int64: 0, 1, ..., n

Two limits follow. A sequence has fewer than 2^31 tokens. And there is no code for uint32: ids of large vocabularies lie
below 2^31, where uint32 and int32 are the same bytes, so code 4 is right for them. DeepSpeed's reader takes code 8 for
uint64 and returns garbage for uint16 with no error: ``export --format deepspeed`` writes int32, which both read alike.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPE_CODES = {"uint16": 8, "uint32": 4}
MAX_LENGTH = 2**31 - 1
CHUNK_DOCUMENTS = 1 << 18


def index_size(documents: int) -> int:
    """Bytes of an index of ``documents`` documents."""
    return HEADER.size + documents * (4 + 8) + (documents + 1) * 8


def index_chunks(document_ends: NDArray[np.uint64], dtype: str) -> Iterator[bytes]:
    """The index file's bytes, piece by piece, for documents that end at ``document_ends`` (in tokens, from 0).

    ``dtype`` is the type of a token in the ``.bin``, ``"uint16"`` or ``"uint32"``.
    """
    count = document_ends.size
    yield HEADER.pack(MAGIC, VERSION, DTYPE_CODES[dtype], count, count + 1)
    for _, starts, ends in _ranges(document_ends):
        yield (ends - starts).astype("<i4").tobytes()
    for _, starts, _ in _ranges(document_ends):
        yield (starts * np.dtype(dtype).itemsize).astype("<i8").tobytes()
    for first, starts, _ in _ranges(document_ends):
        yield np.arange(first, first + starts.size, dtype="<i8").tobytes()
    yield np.asarray([count], dtype="<i8").tobytes()


def _ranges(document_ends: NDArray[np.uint64]) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
    before = 0
    for first in range(0, document_ends.size, CHUNK_DOCUMENTS):
        ends = document_ends[first : first + CHUNK_DOCUMENTS].astype(np.int64)
        yield first, np.concatenate([[before], ends[:-1]]), ends
        before = int(ends[-1])


def read_header(content: bytes) -> tuple[str, int]:
    """Token type and number of documents from an index's first bytes; ``ValueError`` when it is no such index."""
    if len(content) < HEADER.size:
        raise ValueError("shorter than its header")
    magic, version, code, sequences, documents = HEADER.unpack(content[: HEADER.size])
    names = {number: name for name, number in DTYPE_CODES.items()}
    if magic != MAGIC or version != VERSION:
        raise ValueError("not a Megatron index of version 1")
    if code not in names or documents != sequences + 1:
        raise ValueError(f"dtype code {code}, {sequences} sequences, {documents} documents are not what Ice writes")
    return names[code], sequences
