"""The way that exact and near-duplicates share: sign every document, match the keys, cluster, remove.

    sign      one task a piece               signatures/bucket_BBB/PIECE.KIND.sig     (records.py)
    match     one task a bucket and range    pairs/bucket_BBB_PART.pairs              (matching.py)
    cluster   one task                       removals/PIECE.remove                    (clusters.py)
    remove    one task a piece               documents, dropped, tallies              (here)

The parts identify a document by piece and position, so all must see the same pieces in the same order. datatrove's
filters take this on trust, and let everything through when a removal list is missing; here each piece has a list, also
an empty one, a missing one is an error, and each task checks that it saw as many documents as were signed and removed
every one that it was to remove.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dedup.clusters import REMOVAL, ClusterPairs, removal_file
from data_pipeline.dedup.matching import FROM_INDEX, RANGE_BYTES, MatchKeys, count_ranges
from data_pipeline.dedup.records import Layout
from data_pipeline.execution.executors import Executor
from data_pipeline.execution.tally import CountDocuments, DocumentWriter, DroppedWriter, read_tallies, tally_sum
from data_pipeline.inputs.readers import DocumentReader, InputFile


@dataclass(frozen=True)
class Indexing:
    """Earlier indices to match against (folders of one kind), and whether to keep the new keys of this one."""

    earlier: tuple[Path, ...] = ()
    keep: bool = False


NO_INDEX = Indexing()


def signed_documents(folder: Path, pieces: int) -> list[int]:
    """How many documents each piece had when it was signed; ``folder`` is the stage's."""
    tallies = [json.loads((folder / "tallies" / "signed" / f"{piece:05d}.json").read_text()) for piece in range(pieces)]
    return [tally_sum(tally)["documents"] for tally in tallies]


class RemoveDuplicates(PipelineStep):
    """Drops what the removal list of its piece names; a dropped document says which copy was kept.

    The reason is ``REASON``, or ``REASON_in_index`` when an earlier data set has the document; ``metadata`` gets
    ``duplicate_of``: piece and position of the copy that stays, as in ``"00003/17"``, or ``"index"``.
    """

    name = "Ice remove duplicates"
    type = "🫂 - DEDUP"

    def __init__(self, removals: Path, reason: str, documents: Sequence[int], dropped: DroppedWriter) -> None:
        super().__init__()
        self.removals = removals
        self.reason = reason
        self.documents = list(documents)
        self.dropped = dropped

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass on what stays."""
        path = removal_file(self.removals, rank)
        removals = np.frombuffer(path.read_bytes(), REMOVAL)
        next_removal = documents = 0
        with self.dropped as writer:
            for position, document in enumerate(data):
                documents += 1
                if next_removal < len(removals) and removals["document"][next_removal] == position:
                    _, piece, kept = removals[next_removal].tolist()
                    in_index = piece == FROM_INDEX
                    document.metadata["filter_reason"] = self.reason + ("_in_index" if in_index else "")
                    document.metadata["duplicate_of"] = "index" if in_index else f"{piece:05d}/{kept}"
                    writer.write(document, rank)
                    next_removal += 1
                else:
                    yield document
        if documents != self.documents[rank] or next_removal != len(removals):
            raise RuntimeError(
                f"{path}: {documents} documents and {next_removal} removals, where {self.documents[rank]} documents "
                f"were signed and {len(removals)} are to be removed"
            )


def check_removed(folder: Path, removals: Path, pieces: int) -> None:
    """Every document that was to be removed was dropped, and counted."""
    expected = sum(removal_file(removals, piece).stat().st_size for piece in range(pieces)) // REMOVAL.itemsize
    removed = tally_sum(read_tallies(folder / "tallies" / "dropped"))["documents"]
    if removed != expected:
        raise RuntimeError(f"{folder}: {expected} duplicates were found but {removed} were removed")


def remove_duplicates(
    executor: Executor,
    files: Sequence[InputFile],
    folder: Path,
    layout: Layout,
    sign: PipelineStep,
    reason: str,
    indexing: Indexing = NO_INDEX,
    range_bytes: int = RANGE_BYTES,
) -> None:
    """Run the four parts over ``files``, one a piece; ``sign`` writes to ``folder/scratch/signatures``.

    Results in ``folder/documents``, ``folder/dropped``, ``folder/tallies`` and, when kept, ``folder/index/KIND``.
    """
    scratch, logs, pieces = folder / "scratch", folder / "logs", len(files)
    pairs, removals = scratch / "pairs", scratch / "removals"
    signing = [DocumentReader(files), CountDocuments(folder / "tallies" / "signed"), sign]
    executor.run(signing, pieces, logs / "1_signatures")
    documents = signed_documents(folder, pieces)
    ranges = count_ranges(layout, scratch / "signatures", pieces, range_bytes)
    tasks = layout.buckets * ranges
    keep_index = folder / "index" / layout.kind if indexing.keep else None
    match = MatchKeys(layout, scratch / "signatures", pieces, ranges, pairs, indexing.earlier, keep_index)
    executor.run([match], tasks, logs / "2_matches")
    executor.run([ClusterPairs(layout, pairs, tasks, documents, removals)], 1, logs / "3_clusters")
    dropped = DroppedWriter(folder / "dropped", folder / "tallies" / "dropped")
    removing = [
        DocumentReader(files),
        RemoveDuplicates(removals, reason, documents, dropped),
        CountDocuments(folder / "tallies" / "kept"),
        DocumentWriter(folder / "documents"),
    ]
    executor.run(removing, pieces, logs / "4_remove")
    check_removed(folder, removals, pieces)
