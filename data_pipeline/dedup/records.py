"""Sorted keys on disk: what every kind of de-duplication here writes first and matches then.

A *record* is a key (one or more uint64 columns, little-endian) and the place where it was found (``document``, the
position in its piece, and for sentences ``sentence``). Each piece of the corpus writes one file a bucket, sorted by key
and then place, ``bucket_000/00000.SUFFIX``, also when it has no record. An index file holds keys only, sorted, each
once. For MinHash both are byte for byte the files of datatrove's signature stage and of its index.

Files are read by *range* of the first key column: the two ends are found by bisection with a few seeks, so that a
worker reads its share and no more, and never has more than one file open.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[np.void]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Layout:
    """What a record of one kind looks like."""

    kind: str
    buckets: int
    columns: int
    place: tuple[str, ...] = ("document",)

    @property
    def record(self) -> np.dtype[Any]:
        """``key`` (columns of uint64) and the places (uint32), packed."""
        return np.dtype([("key", "<u8", (self.columns,)), *((name, "<u4") for name in self.place)])

    @property
    def key(self) -> np.dtype[Any]:
        """``key`` alone, as index files have it."""
        return np.dtype([("key", "<u8", (self.columns,))])

    def signature_file(self, folder: Path, bucket: int, piece: int) -> Path:
        """The records of one piece."""
        return folder / f"bucket_{bucket:03d}" / f"{piece:05d}.{self.kind}.sig"

    def index_file(self, folder: Path, bucket: int, part: int) -> Path:
        """One range of the kept keys."""
        return folder / f"bucket_{bucket:03d}" / f"{part:05d}.{self.kind}.index"

    def index_files(self, folder: Path, bucket: int) -> list[Path]:
        """All ranges of the kept keys of one bucket."""
        return sorted((folder / f"bucket_{bucket:03d}").glob(f"*.{self.kind}.index"))


def sort_order(keys: Keys) -> npt.NDArray[np.intp]:
    """The order that sorts the rows of ``keys``; rows that are equal keep theirs."""
    return np.lexsort(keys.T[::-1])


def write_signatures(layout: Layout, folder: Path, piece: int, keys: Keys, places: Sequence[npt.NDArray[Any]]) -> None:
    """Write the records of one piece, one file a bucket.

    ``keys`` has the shape (records, buckets, columns); ``places`` one array (records,) for each of ``layout.place``,
    in ascending order.
    """
    for bucket in range(layout.buckets):
        records = np.empty(len(keys), layout.record)
        records["key"] = keys[:, bucket]
        for name, place in zip(layout.place, places, strict=True):
            records[name] = place
        path = layout.signature_file(folder, bucket, piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(records[sort_order(records["key"])].tobytes())


def read_range(path: Path, dtype: np.dtype[Any], low: int = 0, high: int | None = None) -> Records:
    """The records of ``path`` whose first key column is in [low, high); ``high=None`` means to the end."""
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        count, rest = divmod(size, dtype.itemsize)
        if rest:
            raise RuntimeError(f"{path}: {size} bytes are not a whole number of records of {dtype.itemsize} bytes")

        def first_column(record: int) -> int:
            file.seek(record * dtype.itemsize)
            return int.from_bytes(file.read(8), "little")

        start = bisect.bisect_left(range(count), low, key=first_column) if low else 0
        stop = count if high is None else bisect.bisect_left(range(count), high, lo=start, key=first_column)
        file.seek(start * dtype.itemsize)
        content = bytearray((stop - start) * dtype.itemsize)
        view = memoryview(content)
        while view:
            got = file.readinto(view)
            if not got:
                raise RuntimeError(f"{path}: became shorter while it was read")
            view = view[got:]
    return np.frombuffer(content, dtype)


def sample_first_column(paths: Sequence[Path], itemsize: int, samples: int) -> Keys:
    """About ``samples`` values of the first key column, taken evenly over all records of ``paths``; sorted."""
    total = sum(path.stat().st_size for path in paths) // itemsize
    step = max(total // samples, 1)
    values, skip = [], 0
    for path in paths:
        count = path.stat().st_size // itemsize
        with path.open("rb", buffering=0) as file:
            while skip < count:
                file.seek(skip * itemsize)
                values.append(int.from_bytes(file.read(8), "little"))
                skip += step
        skip -= count
    return np.sort(np.array(values, np.uint64))
