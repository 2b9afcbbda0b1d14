"""Published shards out of the pieces' shards: whole documents, in piece order, cut at a set size.

The cut depends on the documents alone, so the bytes are the same for any number of workers. A plan is made from the
pieces' document ends (a binary search for each shard), then each shard is one task that copies its ranges a few
megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dataset.shards import ShardWriter, open_shard, read_description


@dataclass(frozen=True)
class Part:
    """Documents ``[first, last)`` of one piece."""

    path: Path
    first: int
    last: int


def plan_shards(pieces: Sequence[Path], max_tokens: int) -> list[tuple[Part, ...]]:
    """The parts of each shard. A shard is closed after the document that brings it to ``max_tokens``."""
    shards: list[tuple[Part, ...]] = []
    parts: list[Part] = []
    room = max_tokens
    for path in pieces:
        if not read_description(path).entry.documents:
            continue
        ends = open_shard(path).document_ends
        first = start = 0
        while first < ends.size:
            last = min(int(np.searchsorted(ends, np.uint64(start + room))) + 1, ends.size)
            parts.append(Part(path, first, last))
            room -= int(ends[last - 1]) - start
            first, start = last, int(ends[last - 1])
            if room <= 0:
                shards.append(tuple(parts))
                parts, room = [], max_tokens
    if parts:
        shards.append(tuple(parts))
    return shards


def shard_name(number: int) -> str:
    """The ``.bin`` of a published shard."""
    return f"shard_{number:05d}.bin"


class MergeShards(PipelineStep):
    """A pipeline of its own: task number r writes shard number r of the plan."""

    name = "Ice shards"
    type = "🔗 - MERGE"

    def __init__(self, plan: Sequence[tuple[Part, ...]], folder: Path, vocab_size: int) -> None:
        super().__init__()
        self.plan = list(plan)
        self.folder = folder
        self.vocab_size = vocab_size

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write the shards of this task; hands nothing on."""
        for number in range(rank, len(self.plan), world_size):
            with ShardWriter(self.folder / shard_name(number), self.vocab_size) as writer:
                for part in self.plan[number]:
                    writer.copy(open_shard(part.path), part.first, part.last)
        yield from ()
