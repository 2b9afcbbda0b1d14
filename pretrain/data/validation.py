"""The held-out split in stream order, dealt to ranks so that every one runs the same number of batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pretrain.data.loader import IGNORED_TARGET, PADDING_SAMPLE, Batch
from pretrain.data.packing import document_numbers
from pretrain.data.sequences import TokenSequences


def validation_batches(
    sequences: TokenSequences,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    with_documents: bool = False,
) -> Iterator[Batch]:
    """The split in stream order, every token but the first a target exactly once over all ranks.

    With ``limit``, that many sequences (or all, if fewer) evenly spaced over the split, so that every domain with a
    fair share of it takes part. With ``with_documents`` batches carry document ids; the targets are the same.

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
        document_ids = np.zeros(shape, dtype=np.int64)
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
            if with_documents:
                document_ids[row, :count] = document_numbers(sequences.documents, start + 1, count)
                document_ids[row, count:] = document_ids[row, count - 1] + 1
            sample_ids.append(block)
        yield Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(targets),
            tuple(sample_ids),
            torch.from_numpy(domain_ids),
            torch.from_numpy(document_ids) if with_documents else None,
        )
