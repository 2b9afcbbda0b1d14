"""Batches out of token shards: sample i is a pure function of (seed, data set fingerprint, i).

A split is one stream of tokens. It is cut into blocks of ``S + 1`` tokens that overlap by one, so that block b holds
the inputs ``[bS, bS + S)`` and their targets one further; each target belongs to one block only. An *epoch* visits
every block once, in an order given by a keyed permutation::

    epoch, j = divmod(i, n_blocks)        block = permutation(seed, fingerprint, epoch)(j)

The permutation is a Feistel network on the smallest even number of bits that holds ``n_blocks``, walked along its
cycle until it lands inside (at most four steps on average). It needs no memory, no shuffled index and no state: the
loader's whole position is the integer i, and ranks, micro-batches and workers only choose who computes which i.

Shapes: B micro-batch, S sequence length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.dataset.reader import Dataset
from launch.settings import BadInputError

IGNORED_TARGET = -100
PADDING_SAMPLE = -1
FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Sample:
    """One training sequence: ``tokens`` (S + 1,) int64, and which block of the stream it is."""

    sample_id: int
    block: int
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """What a model is given: ``input_ids`` and ``targets`` (B, S) int64, targets already shifted by one.

    A target of -100 does not count. ``sample_ids`` names the rows (-1: a row of padding). ``domain_ids`` (B, S) is
    the domain of each *target* where evaluation asks for it, -1 where the target does not count.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    sample_ids: tuple[int, ...]
    domain_ids: torch.Tensor | None = None


def check_vocabulary(dataset: Dataset, model_vocab_size: int) -> None:
    """Raise ``BadInputError`` when the data has token ids that the model has no embedding for."""
    if dataset.vocab_size > model_vocab_size:
        raise BadInputError(
            f"model.vocab_size = {model_vocab_size}: smaller than the {dataset.vocab_size} tokens of {dataset.folder}; "
            f"set it to at least {dataset.vocab_size}, or prepare the data with a smaller tokenizer.vocab_size"
        )


class KeyedPermutation:
    """A bijection of ``range(size)`` chosen by ``key``: the same key gives the same order on every machine."""

    def __init__(self, size: int, key: bytes) -> None:
        if not 0 < size <= 2**62:
            raise ValueError(f"size = {size} must be in [1, 2^62]")
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * FEISTEL_ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of ``indices`` (any shape, each in ``[0, size)``) in the permuted order."""
        values = indices.astype(np.uint64)
        if values.size and int(values.max()) >= self.size:
            raise IndexError(f"indices must lie in [0, {self.size})")
        values = self._encrypt(values)
        outside = values >= self.size
        while outside.any():
            values[outside] = self._encrypt(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class TokenSequences:
    """A split packed into blocks of ``sequence_length + 1`` tokens, in an order fixed by ``seed``.

    Documents are concatenated, each ended by its end token, and the stream is cut. The last tokens that fill no block
    are left out of training (fewer than ``sequence_length``); validation reads them, see :func:`validation_batches`.
    Raises ``BadInputError`` when the split is shorter than one block.
    """

    def __init__(self, dataset: Dataset, split: str, sequence_length: int, seed: int) -> None:
        self.dataset = dataset
        self.split = split
        self.stream = dataset.split(split)
        self.sequence_length = sequence_length
        self.seed = seed
        self.n_blocks = (self.stream.total_tokens - 1) // sequence_length
        if self.n_blocks < 1:
            raise BadInputError(
                f"{dataset.folder}: {split} has {self.stream.total_tokens} tokens, fewer than one sequence of "
                f"{sequence_length} + 1; use a shorter sequence length or prepare more text"
            )
        self._permutations: dict[int, KeyedPermutation] = {}

    def blocks(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Which block each sample reads: the pure function of (seed, fingerprint, i)."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        if ids.size and int(ids.min()) < 0:
            raise IndexError("sample ids start at 0")
        epochs, places = np.divmod(ids, self.n_blocks)
        result = np.empty_like(ids)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = self._permutation(int(epoch))(places[chosen])
        return result

    def tokens(self, sample_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens of samples, (len(sample_ids), S + 1)."""
        length = self.sequence_length
        rows = [self.stream.read(int(block) * length, length + 1) for block in self.blocks(sample_ids)]
        return np.stack(rows) if rows else np.empty((0, length + 1), dtype=np.int64)

    def sample(self, index: int) -> Sample:
        """Sample ``index`` (0, 1, 2, ... without end; every ``n_blocks`` samples are one epoch)."""
        return Sample(index, int(self.blocks([index])[0]), self.tokens([index])[0])

    def _permutation(self, epoch: int) -> KeyedPermutation:
        if epoch not in self._permutations:
            key = f"{self.seed}/{self.dataset.fingerprint}/{self.split}/{self.sequence_length}/{epoch}"
            # Only neighbouring epochs meet in a batch; forgetting the others keeps memory flat.
            self._permutations = {old: kept for old, kept in self._permutations.items() if abs(old - epoch) <= 1}
            self._permutations[epoch] = KeyedPermutation(self.n_blocks, key.encode())
        return self._permutations[epoch]


class BatchLoader:
    """Deals samples to ranks. No state: a position is the integer ``next_sample``, kept by whoever trains.

    An optimizer step takes the samples ``[next_sample, next_sample + global_batch_size)``; rank r takes a contiguous
    part, cut into micro-batches. So the set of samples of a step depends neither on ranks nor on micro-batches.
    """

    def __init__(
        self,
        sequences: TokenSequences,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank = {rank} must be in [0, {world_size})")
        if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
            raise BadInputError(
                f"global batch size {global_batch_size}: not a positive multiple of micro-batch size "
                f"{micro_batch_size} x {world_size} ranks; change one of the three"
            )
        self.sequences = sequences
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.samples_per_rank = global_batch_size // world_size
        self.rank = rank

    @property
    def batches_per_step(self) -> int:
        """Micro-batches that each rank runs in one optimizer step."""
        return self.samples_per_rank // self.micro_batch_size

    def sample_ids(self, next_sample: int) -> range:
        """The samples of this rank in the step that starts at ``next_sample``."""
        start = next_sample + self.rank * self.samples_per_rank
        return range(start, start + self.samples_per_rank)

    def step_batches(self, next_sample: int) -> list[Batch]:
        """This rank's micro-batches of the step that starts at ``next_sample`` (0 in a new run).

        The next step starts at ``next_sample + global_batch_size``.
        """
        ids = self.sample_ids(next_sample)
        batches = []
        for start in range(0, len(ids), self.micro_batch_size):
            rows = ids[start : start + self.micro_batch_size]
            tokens_BS = torch.from_numpy(self.sequences.tokens(rows))
            batches.append(Batch(tokens_BS[:, :-1].contiguous(), tokens_BS[:, 1:].contiguous(), tuple(rows)))
        return batches


def validation_batches(
    sequences: TokenSequences, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterator[Batch]:
    """The split in stream order, every token but the first a target exactly once over all ranks.

    With ``limit``, that many sequences (or all, if fewer) evenly spaced over the split, so that every domain with a
    fair share of it takes part.

    All ranks yield the same number of batches of the same shape, since a model's collectives must match: the tail of
    the stream and whole rows are padded with end tokens whose targets are -100 and whose domain is -1.
    """
    length, stream = sequences.sequence_length, sequences.stream
    n_blocks = -(-(stream.total_tokens - 1) // length)
    n_chosen = min(limit or n_blocks, n_blocks)
    n_rounds = -(-n_chosen // (batch_size * world_size))
    for step in range(n_rounds):
        first = (step * world_size + rank) * batch_size
        shape = (batch_size, length)
        input_ids = np.full(shape, sequences.dataset.manifest.end_token_id, dtype=np.int64)
        targets = np.full(shape, IGNORED_TARGET, dtype=np.int64)
        domain_ids = np.full(shape, -1, dtype=np.int64)
        sample_ids = []
        for row, chosen in enumerate(range(first, first + batch_size)):
            if chosen >= n_chosen:
                sample_ids.append(PADDING_SAMPLE)
                continue
            block = chosen * n_blocks // n_chosen
            start = block * length
            count = min(length, stream.total_tokens - 1 - start)
            tokens = stream.read(start, count + 1)
            input_ids[row, :count], targets[row, :count] = tokens[:-1], tokens[1:]
            domain_ids[row, :count] = stream.domain_ids(start + 1, count)
            sample_ids.append(block)
        yield Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(targets),
            tuple(sample_ids),
            torch.from_numpy(domain_ids),
        )
