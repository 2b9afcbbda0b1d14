"""Held-out text and problems: of which data sets, and their batches in a fixed order, as many on every rank.

Every data set of a mixture holds text out, every task problems. Each is read once, however many sources choose
documents of it, and a source is then judged by the domains that it takes; lengths and difficulty are matters of
training and choose nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.dataset.reader import Dataset, TokenStream
from launch.settings import BadInputError
from model.token_loss import IGNORED_TARGET
from pretrain.config import DataSection
from pretrain.data.loader import PADDING_SAMPLE, Batch
from pretrain.data.packing import HeldOutRow, document_numbers
from pretrain.data.selection import DocumentStream
from pretrain.data.source import AnyDataset, open_source
from pretrain.data.task_rows import HELD_OUT_PROBLEMS, TaskHeldOut
from pretrain.tasks.dataset import TaskDataset


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

    @property
    def n_blocks(self) -> int:
        """Sequences; every token but the first is a target of one."""
        return -(-(self.stream.total_tokens - 1) // self.sequence_length)

    def read(self, block: int) -> HeldOutRow:
        """A sequence in stream order."""
        start = block * self.sequence_length
        count = min(self.sequence_length, self.stream.total_tokens - 1 - start)
        return HeldOutRow(
            self.stream.read(start, count + 1),
            np.ones(count, dtype=bool),
            self.stream.domain_ids(start + 1, count),
            document_numbers(self.documents, start + 1, count),
        )


AnyHeldOut = HeldOut | TaskHeldOut


def held_out_sets(section: DataSection, main: AnyDataset, opened: Iterable[AnyDataset] = ()) -> list[AnyHeldOut]:
    """The held-out part of ``main`` (the data set of ``data.path``), then of the mixture's others, each once.

    ``opened`` holds data sets that are open already. Raises ``BadInputError`` for one that cannot be opened or holds
    nothing out.
    """
    folders = {each.folder: each for each in (main, *opened) if isinstance(each, Dataset)}
    datasets: dict[Path, AnyDataset] = {main.folder: main}
    sources: dict[Path, dict[str, tuple[str, ...] | None]] = {main.folder: {}}
    for source in section.all_sources:
        dataset = open_source(source, folders)
        datasets.setdefault(dataset.folder, dataset)
        sources.setdefault(dataset.folder, {})[source.label] = source.domains
    held_out: list[AnyHeldOut] = []
    for folder, dataset in datasets.items():
        if isinstance(dataset, TaskDataset):
            problems = dataset.held_out_problems(HELD_OUT_PROBLEMS)
            held_out.append(TaskHeldOut(dataset, section.sequence_length, sources[folder], problems))
            continue
        text = HeldOut(dataset, section.sequence_length, sources[folder])
        held_out.append(text)
        if text.stream.total_tokens < 2:
            raise BadInputError(f"{dataset.folder}: validation has no two tokens; prepare more text")
    return held_out


def validation_batches(
    held_out: AnyHeldOut,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    with_documents: bool = False,
) -> Iterator[Batch]:
    """The held-out sequences in order, every target exactly once over all ranks.

    With ``limit``, that many sequences (or all, if fewer) evenly spaced over the split, so that every domain with a
    fair share of it takes part. With ``with_documents`` batches carry document ids; the targets are the same.

    All ranks yield the same number of batches of the same shape, since a model's collectives must match: the tail of
    the stream and whole rows are padded with end tokens whose targets are -100 and whose domain is -1.
    """
    length, n_blocks = held_out.sequence_length, held_out.n_blocks
    n_chosen = min(limit or n_blocks, n_blocks)
    n_rounds = -(-n_chosen // (batch_size * world_size))
    for step in range(n_rounds):
        first = (step * world_size + rank) * batch_size
        shape = (batch_size, length)
        input_ids = np.full(shape, held_out.dataset.end_token_id, dtype=np.int64)
        targets = np.full(shape, IGNORED_TARGET, dtype=np.int64)
        domain_ids = np.full(shape, -1, dtype=np.int64)
        document_ids = np.zeros(shape, dtype=np.int64)
        sample_ids = []
        for row, chosen in enumerate(range(first, first + batch_size)):
            if chosen >= n_chosen:
                sample_ids.append(PADDING_SAMPLE)
                continue
            block = chosen * n_blocks // n_chosen
            text = held_out.read(block)
            count = len(text.counted)
            input_ids[row, :count] = text.tokens[:-1]
            targets[row, :count] = np.where(text.counted, text.tokens[1:], IGNORED_TARGET)
            domain_ids[row, :count] = np.where(text.counted, text.domain_ids, -1)
            document_ids[row, :count] = text.document_ids
            document_ids[row, count:] = text.document_ids[-1] + 1
            sample_ids.append(block)
        yield Batch(
            torch.from_numpy(input_ids),
            torch.from_numpy(targets),
            tuple(sample_ids),
            torch.from_numpy(domain_ids),
            torch.from_numpy(document_ids) if with_documents else None,
        )
