r"""How documents fill sequences: concatenated and cut anywhere, or packed whole by best fit.

A *row* holds S targets. It is S + 1 tokens: ``tokens[1:]`` are the targets and ``tokens[:-1]`` the inputs, so the first
token only serves as the first target's input.

``concatenate``: row b is tokens ``[bS, bS + S]`` of the stream. Every token but the first is a target of one row,
nothing is padded, and documents are cut wherever a row ends. No memory.

``best_fit`` (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): a document longer than S is cut into
rows of S targets and a rest; documents and rests then go, longest first, each into the fullest row that still has room.
No document of up to S tokens is cut. What fits nowhere else is padded. Packing looks at ``WINDOW_ROWS`` rows' worth of
neighbouring documents at a time, so the result is a function of the documents alone and costs time linear in them:
about a microsecond a document when the data is first opened (a quarter of an hour for 10^9), a table of 13 bytes a
piece and 8 a row (``packing_index.py``: large ones are made once and shared), and 0.1% of padding for documents of 400
tokens in rows of 2,048, of which concatenation cuts a quarter (``tests/benchmarks/loader.py`` prints them).

**Documents of a row.** Each target has a document number (0, 1, ... within the row). An input carries the number of its
*target*: so the end token of a document, read as input, opens the next one. Under a mask that keeps attention inside a
document the first token of a document is then predicted from an end token and nothing else, as at the start of a
generation, and no target is lost: losses with and without the mask are sums over the same tokens. Padding, and the
first token of a rest that follows another document (it was a target in the row before), does not count.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pretrain.data.packing_index import PackedPieces, index_in_files, index_in_memory
from pretrain.data.selection import DocumentStream

PackingName = Literal["concatenate", "best_fit"]
WINDOW_ROWS = 1024


class PackingCache(NamedTuple):
    """Where the table of a large packing is kept, and what names it: ``key`` says which documents of which data set."""

    folder: Path
    key: str
    documents: int


class Row(NamedTuple):
    """One sequence: ``tokens`` (S + 1,) int64.

    ``document_ids`` (S,) int64 numbers the document of each target, None where nobody asked; ``counted`` (S,) bool says
    which targets count, None if all do.
    """

    tokens: NDArray[np.int64]
    document_ids: NDArray[np.int64] | None = None
    counted: NDArray[np.bool_] | None = None


class HeldOutRow(NamedTuple):
    """One held-out sequence, possibly shorter than the others, which are then padded.

    ``tokens`` (n + 1,), and for each of the n targets: whether it counts, its domain, its document within the row.
    """

    tokens: NDArray[np.int64]
    counted: NDArray[np.bool_]
    domain_ids: NDArray[np.int64]
    document_ids: NDArray[np.int64]


class Packing(Protocol):
    """Documents as ``n_rows`` rows of one length, in any order of access."""

    n_rows: int

    def read(self, row: int, offset: int, length: int, with_documents: bool) -> Row:
        """The ``length`` targets of a row from its ``offset``-th on."""
        ...


class Concatenated:
    """The stream cut into rows; the last tokens, fewer than a row, are left out."""

    def __init__(self, stream: DocumentStream, sequence_length: int) -> None:
        self._stream, self._sequence_length = stream, sequence_length
        self.n_rows = max(0, (stream.total_tokens - 1) // sequence_length)

    def read(self, row: int, offset: int, length: int, with_documents: bool) -> Row:
        """The ``length`` targets of a row from its ``offset``-th on."""
        start = row * self._sequence_length + offset
        tokens = self._stream.read(start, length + 1)
        return Row(tokens, document_numbers(self._stream, start + 1, length) if with_documents else None)


def document_numbers(stream: DocumentStream, start: int, count: int) -> NDArray[np.int64]:
    """For each token of ``[start, start + count)`` the number of its document, counted from the first one's."""
    marks = np.zeros(count + 1, dtype=np.int64)
    marks[stream.document_ends(start, count) - start] = 1
    return np.cumsum(marks[:count])


class BestFit:
    """Documents packed whole where they fit."""

    def __init__(
        self, stream: DocumentStream, sequence_length: int, end_token_id: int, cache: PackingCache | None = None
    ) -> None:
        self._stream, self._sequence_length, self._end_token_id = stream, sequence_length, end_token_id
        packed = (_pack(window, sequence_length) for window in _windows(stream, sequence_length))
        if cache is None:
            self._index = index_in_memory(packed)
        else:
            key = f"{cache.key}/{sequence_length}/{WINDOW_ROWS}"
            self._index = index_in_files(cache.folder, key, cache.documents, packed)
        self.n_rows = len(self._index.first_piece) - 1

    @property
    def padding_share(self) -> float:
        """The share of targets that do not count."""
        return 1 - self._stream.total_tokens / (self.n_rows * self._sequence_length)

    @property
    def index_bytes(self) -> int:
        """Size of the table of pieces."""
        return self._index.nbytes

    def read(self, row: int, offset: int, length: int, with_documents: bool) -> Row:
        """The whole row: best fit packs for one length."""
        if (offset, length) != (0, self._sequence_length):
            raise ValueError(f"a row of {self._sequence_length} targets cannot be read in parts")
        if not 0 <= row < self.n_rows:
            raise IndexError(f"row {row} of {self.n_rows}")
        tokens = np.full(length + 1, self._end_token_id, dtype=np.int64)
        counted = np.zeros(length, dtype=bool)
        document_ids = np.empty(length, dtype=np.int64)
        filled = number = 0
        for piece in range(self._index.first_piece[row], self._index.first_piece[row + 1]):
            start, size = int(self._index.starts[piece]), int(self._index.lengths[piece])
            text = self._stream.read(start, size)
            if self._index.continues[piece] and filled == 0:
                tokens[:size] = text
                size -= 1
                counted[:size] = True
                document_ids[:size] = number
            else:
                tokens[filled + 1 : filled + 1 + size] = text
                counted[filled : filled + size] = True
                document_ids[filled : filled + size] = number
                if self._index.continues[piece]:
                    # The text does not begin here: its first token is only read, and the end token before it stays
                    # with the document that it ends.
                    counted[filled] = False
                    document_ids[filled] = number - 1
            filled, number = filled + size, number + 1
        document_ids[filled:] = number  # padding is a document of its own, so that every query has a key
        return Row(tokens, document_ids if with_documents else None, counted)


def _windows(stream: DocumentStream, sequence_length: int) -> Iterator[NDArray[np.int64]]:
    """The edges of neighbouring documents, ``WINDOW_ROWS`` rows' worth at a time; a document is in one window only."""
    size = WINDOW_ROWS * sequence_length
    first = 0
    while first < stream.total_tokens:
        stretch = min(size, stream.total_tokens - first)
        ends = stream.document_ends(first, stretch)
        while not ends.size:  # a document longer than the window
            stretch = min(2 * stretch, stream.total_tokens - first)
            ends = stream.document_ends(first, stretch)
        yield np.concatenate([[first], ends])
        first = int(ends[-1])


def _pack(edges: NDArray[np.int64], capacity: int) -> PackedPieces:
    """Best fit, decreasing, of the documents between ``edges`` into rows of ``capacity`` targets."""
    begins, sizes = edges[:-1], np.diff(edges)
    n_whole, rests = np.divmod(sizes, capacity)
    # Rows that one document fills: each but its first begins with the token before it.
    document = np.repeat(np.arange(sizes.size), n_whole)
    cut = np.arange(document.size) - np.repeat(np.cumsum(n_whole) - n_whole, n_whole)
    full_continues = cut > 0
    full_starts = begins[document] + cut * capacity - full_continues
    full_lengths = np.full(document.size, capacity) + full_continues
    # What is left, and whole documents: longest first, each into the fullest row with room for it.
    left = np.flatnonzero(rests)
    continues = n_whole[left] > 0
    starts = begins[left] + n_whole[left] * capacity - continues
    lengths = rests[left] + continues
    order = np.argsort(-lengths, kind="stable")
    row_of = np.array(_best_fit(lengths[order].tolist(), capacity), dtype=np.int64)
    by_row = order[np.argsort(row_of, kind="stable")]
    return PackedPieces(
        np.concatenate([full_starts, starts[by_row]]),
        np.concatenate([full_lengths, lengths[by_row]]),
        np.concatenate([full_continues, continues[by_row]]),
        np.concatenate([np.ones(document.size, dtype=np.int64), np.bincount(row_of)]),
    )


def _best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The row of each length: the one with the least room that suffices, the first of several, or a new one."""
    stride = len(lengths) + 1
    open_rows: list[int] = []  # room * stride + row, rising: the room decides, then the row
    row_of, n_rows = [], 0
    for length in lengths:
        at = bisect_left(open_rows, length * stride)
        if at < len(open_rows):
            room, row = divmod(open_rows.pop(at), stride)
        else:
            room, row = capacity, n_rows
            n_rows += 1
        if room > length:
            insort(open_rows, (room - length) * stride + row)
        row_of.append(row)
    return row_of
