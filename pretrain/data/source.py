"""What a source of training rows is, prepared on disk or generated, and how the configured ones are opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.reader import Dataset, open_dataset
from pretrain.config import DataSection, SourceSection
from pretrain.data.packing import Row
from pretrain.tasks.dataset import TaskDataset

AnyDataset = Dataset | TaskDataset


class RowSource(Protocol):
    """Rows by number, in an order that seed and data fix: ``TokenSequences`` of shards, ``TaskRows`` of a generator."""

    @property
    def dataset(self) -> AnyDataset:
        """What the rows are made of."""
        ...

    @property
    def key(self) -> str:
        """The same text for the same rows."""
        ...

    @property
    def n_blocks(self) -> int:
        """Rows of an epoch."""
        ...

    @property
    def total_tokens(self) -> int:
        """Tokens of an epoch."""
        ...

    def blocks_at(self, epochs: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row at each place of an epoch's order."""
        ...

    def read(self, block: int, offset: int, length: int, with_documents: bool) -> Row:
        """The ``length`` targets of a row from its ``offset``-th on."""
        ...


def open_source(source: SourceSection, opened: Mapping[Path, Dataset] | None = None) -> AnyDataset:
    """The data set of a source, one of ``opened`` (by folder) where it is there; ``BadInputError`` as opening says."""
    if source.task is not None:
        return TaskDataset(source.task)
    folder = Path(source.path)
    return (opened or {}).get(folder) or open_dataset(folder)


def open_main(section: DataSection) -> AnyDataset:
    """The data set of ``data.path``; where that is empty, the task of the first source."""
    return open_dataset(Path(section.path)) if section.path else open_source(section.all_sources[0])
