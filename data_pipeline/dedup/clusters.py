"""From pairs of duplicates to what is removed: of every cluster, all but its first document.

If A and B are duplicates, and B and C, then A, B and C are one cluster, and the copy that comes first in the corpus
(lowest piece, then lowest position) stays. A cluster that touches an earlier index goes entirely: an earlier data set
has it.

The clusters are the connected components of the pairs. Documents are numbered in corpus order, the index is number 0,
and ``parent[x] <= x`` always holds, so a component's root *is* the document to keep. Pairs are read one file after the
other and whole arrays of them linked at once: each root takes the lowest root it is paired with, until the two ends of
every pair have the same root. Memory: 8 bytes a document of the corpus, plus one file of pairs; this is the only part
of de-duplication whose memory grows with the corpus (a billion documents: 8 GB, in one task).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dedup.matching import FROM_INDEX, read_pairs
from data_pipeline.dedup.records import Layout

Nodes = npt.NDArray[np.int64]

PAIR = np.dtype([("first", "<u4", (2,)), ("other", "<u4", (2,))])
REMOVAL = np.dtype([("document", "<u4"), ("kept_piece", "<u4"), ("kept_document", "<u4")])
CHUNK = 1 << 22


def roots_of(parent: Nodes, nodes: Nodes) -> Nodes:
    """The root of each of ``nodes``."""
    roots = parent[nodes]
    while True:
        above = parent[roots]
        if (above == roots).all():
            return roots
        roots = above


def link(parent: Nodes, first: Nodes, other: Nodes) -> None:
    """Join the components of ``first[i]`` and ``other[i]``, for all i, in place; every root is its lowest member."""
    while first.size:
        first, other = roots_of(parent, first), roots_of(parent, other)
        apart = first != other
        first, other = first[apart], other[apart]
        np.minimum.at(parent, np.maximum(first, other), np.minimum(first, other))


def flatten(parent: Nodes) -> None:
    """Make every node point at its root, in place. Parents come first, so one pass over chunks is enough."""
    for start in range(0, len(parent), CHUNK):
        nodes = np.arange(start, min(start + CHUNK, len(parent)))
        parent[nodes] = roots_of(parent, nodes)


def removal_file(folder: Path, piece: int) -> Path:
    """What is removed from one piece."""
    return folder / f"{piece:05d}.remove"


class ClusterPairs(PipelineStep):
    """One task: writes the removals of every piece, an empty file where there are none.

    ``documents`` is the number of documents of each piece.
    """

    name = "Ice clusters"
    type = "🫂 - DEDUP"

    def __init__(self, layout: Layout, pairs: Path, match_tasks: int, documents: Sequence[int], removals: Path) -> None:
        super().__init__()
        self.layout = layout
        self.pairs = pairs
        self.match_tasks = match_tasks
        self.documents = list(documents)
        self.removals = removals

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Read all pairs, write all removals."""
        if world_size != 1:
            raise RuntimeError(f"clusters are found by one task, not {world_size}")
        starts = np.concatenate([[1], 1 + np.cumsum(self.documents, dtype=np.int64)])
        parent = np.arange(starts[-1])
        for path in read_pairs(self.pairs, self.layout, self.match_tasks):
            pairs = np.fromfile(path, PAIR)
            link(parent, self._numbers(pairs["first"], starts, path), self._numbers(pairs["other"], starts, path))
        flatten(parent)
        self.removals.mkdir(parents=True, exist_ok=True)
        for piece, (start, stop) in enumerate(pairwise(starts.tolist())):
            part = parent[start:stop]
            removed = np.flatnonzero(part != np.arange(start, stop))
            kept = part[removed]
            records = np.empty(len(removed), REMOVAL)
            records["document"] = removed
            of_piece = np.searchsorted(starts, np.maximum(kept, 1), side="right") - 1
            records["kept_piece"] = np.where(kept == 0, FROM_INDEX, of_piece)
            records["kept_document"] = np.where(kept == 0, FROM_INDEX, kept - starts[of_piece])
            removal_file(self.removals, piece).write_bytes(records.tobytes())

    def _numbers(self, places: npt.NDArray[np.uint32], starts: Nodes, path: Path) -> Nodes:
        piece, document = places[:, 0].astype(np.int64), places[:, 1].astype(np.int64)
        from_index = piece == FROM_INDEX
        piece[from_index] = 0
        if (piece >= len(self.documents)).any() or (document >= np.diff(starts)[piece])[~from_index].any():
            raise RuntimeError(f"{path}: names documents that the corpus does not have; its files were mixed up")
        return np.where(from_index, 0, starts[piece] + document)
