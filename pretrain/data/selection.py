"""Some documents of a data set as a token stream of their own: by domain, by length, by difficulty.

The chosen documents follow one another in the data set's order, each with its end token, as if the others had never
been published. Whatever is built on a stream (blocks, packing, shuffling) works on a selection unchanged.

**Difficulty** of a document is its tokens for each byte of UTF-8 text: what the tokenizer, trained on the whole corpus,
could not compress is rare or irregular. A better measure (a small model's loss, say) can be given as a ``.npy`` file of
one number for each document. Bounds are quantiles over documents, so that ``[0, 0.5]`` and ``[0.5, 1]`` are the easier
and the harder half, whatever the scale; ties are broken by the stream's order, so the two never share a document.

Cost: 16 bytes for each *run* of neighbouring chosen documents, and a few tens of bytes a document while the selection
is made. A data set of 10^9 documents with its domains mixed needs up to 16 GB a process: publish domains as data sets
of their own at that scale, and each needs nothing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.reader import Dataset, TokenStream
from launch.settings import BadInputError


@dataclass(frozen=True)
class Selection:
    """Which documents. Lengths are in tokens without the end token, bounds included.

    ``difficulty`` holds documents from the first quantile up to, not including, the second (1 includes the last).
    """

    domains: tuple[str, ...] | None = None
    min_document_tokens: int | None = None
    max_document_tokens: int | None = None
    difficulty: tuple[float, float] | None = None
    difficulty_file: str | None = None

    @property
    def is_everything(self) -> bool:
        """Whether nothing is left out, so that the stream itself serves."""
        return self == Selection()

    def key(self) -> str:
        """The same text for the same choice, "" for everything; a difficulty file counts by its content."""
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        if self.difficulty_file is not None:
            chosen["difficulty_file"] = hashlib.sha256(Path(self.difficulty_file).read_bytes()).hexdigest()
        return json.dumps(chosen, sort_keys=True) if chosen else ""


def chosen_documents(dataset: Dataset, split: str, selection: Selection) -> NDArray[np.bool_]:
    """For each document of the split, in stream order, whether ``selection`` holds it.

    Raises ``BadInputError`` for a domain that the data set does not have and for an unusable difficulty file.
    """
    shards = dataset.split(split).shards
    lengths = np.concatenate([np.diff(shard.document_ends, prepend=np.uint64(0)) for shard in shards]).astype(np.int64)
    chosen = np.ones(lengths.size, dtype=bool)
    if selection.domains is not None:
        unknown = [name for name in selection.domains if name not in dataset.domains]
        if unknown:
            raise BadInputError(
                f"data.sources: domain {unknown[0]!r} is not one of {dataset.folder}: {', '.join(dataset.domains)}"
            )
        # Ids that no domain has (a damaged shard) are never chosen.
        wanted = [index for index, name in enumerate(dataset.domains) if name in selection.domains]
        chosen &= np.isin(np.concatenate([shard.domain_ids for shard in shards]), wanted)
    if selection.min_document_tokens is not None:
        chosen &= lengths - 1 >= selection.min_document_tokens
    if selection.max_document_tokens is not None:
        chosen &= lengths - 1 <= selection.max_document_tokens
    if selection.difficulty is not None:
        if selection.difficulty_file is None:
            sizes = np.concatenate([shard.utf8_bytes for shard in shards])
            difficulty: NDArray[np.floating] = lengths / np.maximum(sizes, 1)
        else:
            difficulty = _read_difficulty(Path(selection.difficulty_file), lengths.size)
        quantile = np.empty(lengths.size)
        quantile[np.argsort(difficulty, kind="stable")] = np.arange(lengths.size) / lengths.size
        chosen &= (quantile >= selection.difficulty[0]) & (quantile < selection.difficulty[1])
    return chosen


def _read_difficulty(path: Path, documents: int) -> NDArray[np.floating]:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInputError(f"{path}: not a .npy file of numbers ({error}); write it with numpy.save") from None
    if not isinstance(values, np.ndarray) or values.shape != (documents,) or values.dtype.kind not in "fiu":
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "an archive of arrays"
        raise BadInputError(f"{path}: holds {found}; one number for each of {documents} documents is needed")
    if not np.isfinite(values).all():
        raise BadInputError(f"{path}: holds a number that is not finite")
    return values.astype(np.float64)


class DocumentStream:
    """A ``TokenStream``, or the documents of it that ``chosen`` (one bool a document, in order) marks."""

    def __init__(self, stream: TokenStream, chosen: NDArray[np.bool_] | None = None) -> None:
        self._stream = stream
        # Plain views of the mapped files: slicing a memmap costs more than what is done with a slice here.
        self._ends = [np.asarray(shard.document_ends) for shard in stream.shards]
        self._shard_starts = np.cumsum([0, *(shard.tokens.size for shard in stream.shards)], dtype=np.int64)
        if chosen is None:
            self._run_starts = np.zeros(1, dtype=np.int64)
            self._virtual_starts = np.array([0, stream.total_tokens], dtype=np.int64)
        else:
            starts, ends = self._runs(chosen)
            self._run_starts = starts
            self._virtual_starts = np.concatenate([[0], np.cumsum(ends - starts)])
        self.total_tokens = int(self._virtual_starts[-1])

    def _runs(self, chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token and end of each run of neighbouring chosen documents."""
        edges = np.concatenate([[0], self._all_ends()])  # document d is tokens [edges[d], edges[d + 1])
        steps = np.diff(chosen.astype(np.int8), prepend=0, append=0)
        return edges[np.flatnonzero(steps == 1)], edges[np.flatnonzero(steps == -1)]

    def _all_ends(self) -> NDArray[np.int64]:
        starts = self._shard_starts[:-1]
        return np.concatenate([ends.astype(np.int64) + start for ends, start in zip(self._ends, starts, strict=True)])

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens ``[start, start + count)`` of the selection, int64."""
        if len(self._run_starts) == 1:
            return self._stream.read(start + int(self._run_starts[0]), count)
        result = np.empty(count, dtype=np.int64)
        for virtual, physical, length in self._pieces(start, count):
            result[virtual - start : virtual - start + length] = self._stream.read(physical, length)
        return result

    def document_ends(self, start: int, count: int) -> NDArray[np.int64]:
        """The positions p in ``(start, start + count]`` such that a document ends with token p - 1; rising."""
        found = []
        for virtual, physical, length in self._pieces(start, count):
            found.append(self._physical_ends(physical, length) + (virtual - physical))
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int]]:
        """``(position in the selection, position in the stream, length)`` of each run's share of a stretch."""
        if start < 0 or count < 0 or start + count > self.total_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a selection of {self.total_tokens}")
        pieces = []
        run = int(np.searchsorted(self._virtual_starts, start, side="right")) - 1
        while count:
            inside = start - int(self._virtual_starts[run])
            length = min(count, int(self._virtual_starts[run + 1]) - start)
            pieces.append((start, int(self._run_starts[run]) + inside, length))
            start, count, run = start + length, count - length, run + 1
        return pieces

    def _physical_ends(self, start: int, count: int) -> NDArray[np.int64]:
        found = []
        shard = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        while shard < len(self._ends) and int(self._shard_starts[shard]) < start + count:
            base, ends = int(self._shard_starts[shard]), self._ends[shard]
            # Bounds in the array's own type: numpy would otherwise convert, and so read, the whole mapped array.
            bounds = np.array([max(start - base, 0), start + count - base], dtype=ends.dtype)
            low, high = np.searchsorted(ends, bounds, side="right")
            inside = ends[low:high].astype(np.int64)
            if inside.size and (inside[0] <= start - base or inside[-1] > bounds[1] or (np.diff(inside) <= 0).any()):
                raise BadInputError(
                    f"{self._stream.shards[shard].path}: its document ends do not rise: the shard is damaged; prepare "
                    "the data set again"
                )
            found.append(inside + base)
            shard += 1
        return np.concatenate(found)
