"""The table of a packing: which pieces of the stream fill which row; in memory, or in files that all processes share.

    row r holds pieces first_piece[r] ... first_piece[r + 1] - 1; piece p is tokens [starts[p], starts[p] + lengths[p])

At 13 bytes a piece and 8 a row, a table of 10^9 documents is 17 GB and takes a quarter of an hour to work out: too much
for every rank of every run. So a large one is made once, in files that are mapped (a machine holds their pages once),
under a folder that its key names::

    CACHE/best_fit-<hash of the key>/    index.json  starts.bin  lengths.bin  continues.bin  first_piece.bin

The key names everything that the table is a function of, the data set's fingerprint first, and ``index.json`` repeats
it; sizes are compared when a table is opened. The folder gets its name when all is on the disk, so a table is whole or
absent. Who finds none takes a lock and makes it; the others wait for the lock. The system frees the lock of a process
that dies, so nobody waits for a dead one, and waiting has a limit. Where locks are not supported every process makes
the table, and the first one's stays. Tables can be removed at any time: the next run makes what it needs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from launch.files import fsync_path, write_json_atomically
from launch.settings import BadInputError

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
TYPES = {"starts": "<i8", "lengths": "<i4", "continues": "|b1", "first_piece": "<i8"}
POLL_SECONDS = 0.5
# How long to wait for another process's table: ten times what making it takes, and ten minutes for a slow machine.
WAIT_SECONDS = 600.0
WAIT_SECONDS_PER_DOCUMENT = 1e-5


class PackedPieces(NamedTuple):
    """Pieces of the stream in the order of rows. A piece that ``continues`` a document has one token before it."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    continues: NDArray[np.bool_]
    pieces_per_row: NDArray[np.int64]


class PackingIndex(NamedTuple):
    """The table; the first three have an entry a piece, ``first_piece`` one a row and one more."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    continues: NDArray[np.bool_]
    first_piece: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Its size, in memory or in files."""
        return sum(table.nbytes for table in self)


def index_in_memory(parts: Iterable[PackedPieces]) -> PackingIndex:
    """The table of ``parts``, the packed windows in order."""
    columns = list(zip(*parts, strict=True))
    starts, lengths, continues, sizes = (np.concatenate(column) for column in columns)
    first_piece = np.concatenate([[0], np.cumsum(sizes)])
    return PackingIndex(starts, lengths.astype(np.int32), continues, first_piece)


def index_in_files(
    cache: Path,
    key: str,
    documents: int,
    parts: Iterable[PackedPieces],
    wait_seconds: float | None = None,
) -> PackingIndex:
    """The table that ``cache`` holds for ``key``, made of ``parts`` if it holds none.

    ``parts`` are asked for one by one, so memory is that of a window. ``documents`` scales how long another process
    that is making the table is waited for.

    Raises:
        BadInputError: The folder cannot be written, or the wait was in vain; names ``data.cache``.
    """
    folder = cache / f"best_fit-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
    if (found := _open(folder, key)) is not None:
        return found
    limit = WAIT_SECONDS + WAIT_SECONDS_PER_DOCUMENT * documents if wait_seconds is None else wait_seconds
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock", limit):
            if (found := _open(folder, key)) is None:
                print(f"packing {documents:,} documents by best fit, once for all runs: {folder}", file=sys.stderr)
                _make(folder, key, parts)
                found = _open(folder, key)
    except OSError as error:
        raise BadInputError(
            f"{cache}: cannot hold the table of a packing ({error.strerror}); set data.cache to a folder with room "
            "that all ranks can write"
        ) from None
    if found is None:
        raise BadInputError(f"{folder}: is not the table that was just made there; remove it, or set data.cache")
    return found


def _make(folder: Path, key: str, parts: Iterable[PackedPieces]) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)  # damaged, or of another format
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        counts = _write(partial, parts)
        for name in TYPES:
            fsync_path(partial / f"{name}.bin")
        write_json_atomically(partial / INDEX_NAME, {"format_version": FORMAT_VERSION, "key": key, "counts": counts})
        try:
            partial.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Without locks another process may have been faster; its table is the same.
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, parts: Iterable[PackedPieces]) -> dict[str, int]:
    files = {name: (folder / f"{name}.bin").open("wb") for name in TYPES}
    counts, pieces = dict.fromkeys(TYPES, 0), 0

    def append(name: str, values: NDArray[Any]) -> None:
        files[name].write(values.astype(TYPES[name]).tobytes())
        counts[name] += values.size

    try:
        append("first_piece", np.zeros(1))
        for part in parts:
            append("starts", part.starts)
            append("lengths", part.lengths)
            append("continues", part.continues)
            append("first_piece", pieces + np.cumsum(part.pieces_per_row))
            pieces += part.starts.size
    finally:
        _close(files.values())
    return counts


def _close(files: Iterable[BinaryIO]) -> None:
    """Close all of them, also when the first ones cannot be written out; then raise that error."""
    errors = []
    for file in files:
        try:
            file.close()
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _open(folder: Path, key: str) -> PackingIndex | None:
    """The table in ``folder``; None when there is none, or not a whole one for ``key``."""
    try:
        described = json.loads((folder / INDEX_NAME).read_text())
        if (described["format_version"], described["key"]) != (FORMAT_VERSION, key):
            return None
        columns = {}
        for name, kind in TYPES.items():
            path, count = folder / f"{name}.bin", described["counts"][name]
            if path.stat().st_size != count * np.dtype(kind).itemsize:
                return None
            # A plain view of the mapped file: slicing a memmap costs more than reading what it shows.
            columns[name] = np.asarray(np.memmap(path, kind, "r", shape=(count,)))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return PackingIndex(**columns)


@contextmanager
def _locked(path: Path, limit_seconds: float) -> Iterator[None]:
    """Hold ``path``; a process that ends, however it ends, holds it no longer."""
    deadline = time.monotonic() + limit_seconds
    with path.open("w") as file:
        while True:
            try:
                # Not flock(): that would pass to forked processes, which may outlive this one.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    break
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
            if time.monotonic() > deadline:
                raise BadInputError(
                    f"{path}: another process has been making this table for {limit_seconds:,.0f} s; look at what "
                    "holds the lock (lslocks), or set data.cache to another folder"
                )
            time.sleep(POLL_SECONDS)
        yield  # the file stays: who waits for it must meet the next one on the same file
