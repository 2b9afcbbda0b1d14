"""Which records have equal keys: the same search for exact copies, MinHash buckets and sentences.

One task matches one range of the key space of one bucket. The ranges are cut by quantiles of the keys themselves, and
so many that a task holds about ``RANGE_BYTES`` of records, whatever the size of the corpus: more documents mean more
tasks, not larger ones. What a task writes depends on the records only.

In a range, the records of all pieces are put in corpus order, behind the keys of earlier indices, and sorted by key.
Every record that is not the first of its key gives a pair (first, record), as datatrove's bucket stage writes it: four
little-endian uint32, piece and document of the one and of the other, ``FROM_INDEX`` twice for a key of an index. Here
the first of a group is paired with each other one, and datatrove pairs neighbours: the groups are the same. With
``keep_index``, the keys that no earlier index has are written too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dedup.records import Keys, Layout, read_range, sample_first_column, sort_order

RANGE_BYTES = 1 << 29
SAMPLES_A_RANGE = 256
FROM_INDEX = 0xFFFFFFFF

Rows = npt.NDArray[np.intp]


def equal_rows(keys: Keys) -> tuple[Rows, Rows]:
    """Pairs (first, other) of rows of ``keys`` (rows, columns) that are equal; ``first`` is the lowest row of all.

    Only rows that share their first column with another are compared in full: nearly all others are unique.
    """
    order = np.argsort(keys[:, 0], kind="stable")
    same = keys[order[1:], 0] == keys[order[:-1], 0]
    shared = np.zeros(len(keys), bool)
    shared[1:] = same
    shared[:-1] |= same
    rows = order[shared]
    rows = rows[sort_order(keys[rows])]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (keys[rows[1:]] != keys[rows[:-1]]).any(axis=1)
    first = rows[is_first][np.cumsum(is_first) - 1] if len(rows) else rows
    return first[~is_first], rows[~is_first]


def count_ranges(layout: Layout, signatures: Path, pieces: int, range_bytes: int = RANGE_BYTES) -> int:
    """How many tasks a bucket needs."""
    sizes = (layout.signature_file(signatures, 0, piece).stat().st_size for piece in range(pieces))
    return max(1, -(-sum(sizes) // range_bytes))


class MatchKeys(PipelineStep):
    """Task ``bucket * ranges + part`` writes ``bucket_BBB_PPPPP.pairs``; run exactly ``buckets * ranges`` tasks."""

    name = "Ice equal keys"
    type = "🫂 - DEDUP"

    def __init__(
        self,
        layout: Layout,
        signatures: Path,
        pieces: int,
        ranges: int,
        pairs: Path,
        earlier: Sequence[Path] = (),
        keep_index: Path | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.signatures = signatures
        self.pieces = pieces
        self.ranges = ranges
        self.pairs = pairs
        self.earlier = list(earlier)
        self.keep_index = keep_index

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Match one range of one bucket."""
        if world_size != self.layout.buckets * self.ranges:
            raise RuntimeError(f"{world_size} tasks for {self.layout.buckets} buckets of {self.ranges} ranges")
        bucket, part = divmod(rank, self.ranges)
        files = [self.layout.signature_file(self.signatures, bucket, piece) for piece in range(self.pieces)]
        low, high = self._limits(files, part)
        known = [
            read_range(file, self.layout.key, low, high)["key"]
            for folder in self.earlier
            for file in self.layout.index_files(folder, bucket)
        ]
        found = [read_range(file, self.layout.record, low, high) for file in files]
        keys = np.concatenate([*known, *(records["key"] for records in found)])
        n_known = sum(map(len, known))
        # A place is a row of uint32: the piece, then what the layout names; rows of an index are FROM_INDEX throughout.
        places = np.full((len(keys), 1 + len(self.layout.place)), FROM_INDEX, "<u4")
        places[n_known:, 0] = np.repeat(np.arange(self.pieces), [len(records) for records in found])
        for column, name in enumerate(self.layout.place, start=1):
            places[n_known:, column] = np.concatenate([records[name] for records in found])
        del known, found
        first, other = equal_rows(keys)
        own = other >= n_known
        first, other = first[own], other[own]
        self.pairs.mkdir(parents=True, exist_ok=True)
        path = self.pairs / f"bucket_{bucket:03d}_{part:05d}.pairs"
        path.write_bytes(np.hstack([places[first], places[other]]).tobytes())
        if self.keep_index:
            new = np.ones(len(keys), bool)
            new[:n_known] = False
            new[other] = False
            self._write_index(keys[new], bucket, part)

    def _limits(self, files: Sequence[Path], part: int) -> tuple[int, int | None]:
        if self.ranges == 1:
            return 0, None
        sample = sample_first_column(files, self.layout.record.itemsize, self.ranges * SAMPLES_A_RANGE)
        cuts = [int(sample[len(sample) * index // self.ranges]) for index in range(1, self.ranges)]
        return (cuts[part - 1] if part else 0), (cuts[part] if part < self.ranges - 1 else None)

    def _write_index(self, keys: Keys, bucket: int, part: int) -> None:
        assert self.keep_index is not None
        path = self.layout.index_file(self.keep_index, bucket, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(np.ascontiguousarray(keys[sort_order(keys)], "<u8").tobytes())


def read_pairs(folder: Path, layout: Layout, tasks: int) -> list[Path]:
    """The files that all ``tasks`` wrote, in their order; one that is missing is an error, not "no duplicates"."""
    files = sorted(folder.glob("bucket_*.pairs"))
    if len(files) != tasks:
        raise RuntimeError(f"{folder}: {len(files)} files of matches where {tasks} were written for {layout.kind}")
    return files
