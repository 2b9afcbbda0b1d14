"""A source's sequences, in an order fixed by a seed: row i of epoch e is a pure function of (seed, data, e, i).

An *epoch* visits every row once, in an order given by a keyed permutation::

    epoch, j = divmod(i, n_blocks)        block = permutation(seed, fingerprint, epoch)(j)

It needs no memory, no shuffled index and no state. The key also names split, sequence length, selection and packing, so
that no two of them share an order by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.reader import Dataset
from data_pipeline.permutation import KeyedPermutation
from launch.settings import BadInputError
from pretrain.data.packing import BestFit, Concatenated, Packing, PackingCache, PackingName, Row
from pretrain.data.selection import DocumentStream, Selection

# Fewer documents are packed again in each process: a second of work and some 20 MB.
CACHED_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class Sample:
    """One training sequence: ``tokens`` (S + 1,) int64, and which block of the stream it is."""

    sample_id: int
    block: int
    tokens: NDArray[np.int64]


class TokenSequences:
    """A split packed into rows of ``sequence_length`` targets, in an order fixed by ``seed``.

    With ``chosen`` (one bool a document) only those documents, which ``selection`` describes. By default documents are
    concatenated, each ended by its end token, and the stream is cut; the last tokens that fill no row are left out of
    training; validation reads them, see ``pretrain.data.validation``. Raises ``BadInputError`` when there is less than
    one row. With a ``cache`` folder the table of a packing of many documents is kept there, for all processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        sequence_length: int,
        seed: int,
        packing: PackingName = "concatenate",
        selection: Selection = Selection(),  # noqa: B008 (frozen)
        chosen: NDArray[np.bool_] | None = None,
        cache: Path | None = None,
    ) -> None:
        self.dataset, self.split, self.sequence_length, self.seed = dataset, split, sequence_length, seed
        self.stream = dataset.split(split)
        self.documents = DocumentStream(self.stream, chosen)
        if self.documents.total_tokens <= sequence_length:
            what = "the chosen documents have" if chosen is not None else f"{split} has"
            raise BadInputError(
                f"{dataset.folder}: {what} {self.documents.total_tokens} tokens, fewer than one sequence of "
                f"{sequence_length} + 1; use a shorter sequence length or prepare more text"
            )
        parts = [part for part in (selection.key(), packing if packing != "concatenate" else "") if part]
        self.key = "/".join([dataset.fingerprint, split, str(sequence_length), *parts])
        self.packing: Packing
        if packing == "concatenate":
            self.packing = Concatenated(self.documents, sequence_length)
        else:
            n_documents = sum(shard.document_ends.size for shard in self.stream.shards)
            n_chosen = n_documents if chosen is None else int(chosen.sum())
            is_large = n_chosen >= CACHED_DOCUMENTS
            kept = PackingCache(cache, self.key, n_chosen) if cache is not None and is_large else None
            self.packing = BestFit(self.documents, sequence_length, dataset.manifest.end_token_id, kept)
        self.n_blocks = self.packing.n_rows
        self._permutations: dict[int, KeyedPermutation] = {}

    def blocks(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Which block each sample reads, when this source is all there is: sample i is place i of the epochs."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        if ids.size and int(ids.min()) < 0:
            raise IndexError("sample ids start at 0")
        return self.blocks_at(*np.divmod(ids, self.n_blocks))

    def blocks_at(self, epochs: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The block at each place of an epoch's order."""
        if epochs.size and int(epochs.min()) == int(epochs.max()):
            return self._permutation(int(epochs[0]))(places)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._permutation(int(epoch))(places[chosen])
        return result

    @property
    def total_tokens(self) -> int:
        """Tokens of the chosen documents."""
        return self.documents.total_tokens

    def read(self, block: int, offset: int, length: int, with_documents: bool) -> Row:
        """The ``length`` targets of a row from its ``offset``-th on."""
        return self.packing.read(block, offset, length, with_documents)

    def tokens(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of samples, (len(sample_ids), S + 1)."""
        length = self.sequence_length
        rows = [self.packing.read(int(block), 0, length, False).tokens for block in self.blocks(sample_ids)]
        return np.stack(rows) if rows else np.empty((0, length + 1), dtype=np.int64)

    def rows(self, sample_ids: Sequence[int], with_documents: bool = False) -> list[Row]:
        """The rows of samples, when this source is all there is."""
        return [
            self.packing.read(int(block), 0, self.sequence_length, with_documents) for block in self.blocks(sample_ids)
        ]

    def sample(self, index: int) -> Sample:
        """Sample ``index`` (0, 1, 2, ... without end; every ``n_blocks`` samples are one epoch)."""
        return Sample(index, int(self.blocks([index])[0]), self.tokens([index])[0])

    def _permutation(self, epoch: int) -> KeyedPermutation:
        permutation = self._permutations.get(epoch)
        if permutation is None:
            permutation = KeyedPermutation(self.n_blocks, f"{self.seed}/{self.key}/{epoch}".encode())
            # Only neighbouring epochs meet in a batch; forgetting the others keeps memory flat. Threads share this
            # object: a new dictionary each time, so that no other thread sees one change under its hands.
            kept = {old: value for old, value in self._permutations.items() if abs(old - epoch) <= 1}
            self._permutations = {**kept, epoch: permutation}
        return permutation
