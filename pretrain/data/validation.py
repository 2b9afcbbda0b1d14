"""Held-out text: of which data sets, and its batches in stream order, as many on every rank.

Every data set of a mixture holds text out. Each is read once, however many sources choose documents of it, and a source
is then judged by the domains that it takes; lengths and difficulty are matters of training and choose nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.dataset.reader import Dataset, TokenStream, open_dataset
from launch.settings import BadInputError
from model.token_loss import IGNORED_TARGET
from pretrain.config import DataSection
from pretrain.data.loader import PADDING_SAMPLE, Batch
from pretrain.data.packing import document_numbers
from pretrain.data.selection import DocumentStream


@dataclass(frozen=True)
class HeldOut:
    """The validation split of a data set, in sequences of ``sequence_length``.

    ``sources`` has the mixture's sources that are made of this data set, by name: their domains, or None for all.
    """

    dataset: Dataset
    sequence_length: int
    sources: Mapping[str, tuple[str, ...] | None]

    @property
    def stream(self) -> TokenStream:
        """The split's tokens."""
        return self.dataset.split("validation")

    @property
    def documents(self) -> DocumentStream:
        """The same tokens, with where documents end."""
        return DocumentStream(self.stream)


def held_out_sets(section: DataSection, main: Dataset, opened: Mapping[Path, Dataset] | None = None) -> list[HeldOut]:
    """The held-out text of ``main`` (the data set of ``data.path``), then of the mixture's others, each once.

    ``opened`` holds data sets that are open already, by folder. Raises ``BadInputError`` for one that cannot be opened
    or holds nothing out.
    """
    datasets = {main.folder: main, **(opened or {})}
    sources: dict[Path, dict[str, tuple[str, ...] | None]] = {main.folder: {}}
    for source in section.all_sources:
        sources.setdefault(Path(source.path), {})[source.label] = source.domains
    held_out = [
        HeldOut(datasets.get(folder) or open_dataset(folder), section.sequence_length, of_folder)
        for folder, of_folder in sources.items()
    ]
    for entry in held_out:
        if entry.stream.total_tokens < 2:
            raise BadInputError(f"{entry.dataset.folder}: validation has no two tokens; prepare more text")
    return held_out


def validation_batches(
    held_out: HeldOut,
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
    length, stream, documents = held_out.sequence_length, held_out.stream, held_out.documents
    n_blocks = -(-(stream.total_tokens - 1) // length)
    n_chosen = min(limit or n_blocks, n_blocks)
    n_rounds = -(-n_chosen // (batch_size * world_size))
    for step in range(n_rounds):
        first = (step * world_size + rank) * batch_size
        shape = (batch_size, length)
        input_ids = np.full(shape, held_out.dataset.manifest.end_token_id, dtype=np.int64)
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
                document_ids[row, :count] = document_numbers(documents, start + 1, count)
                document_ids[row, count:] = document_ids[row, count - 1] + 1
            sample_ids.append(block)
        yield Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(targets),
            tuple(sample_ids),
            torch.from_numpy(domain_ids),
            torch.from_numpy(document_ids) if with_documents else None,
        )
