"""Passages once: of equal runs of ``sentence_span`` sentences the first one stays (as in C4, Raffel et al. 2020).

A sentence ends at a full stop, question or exclamation mark followed by space, or at a line's end, and includes the
space after it, so that sentences are removed without a trace. Runs are compared in their normal form, by a 64-bit hash
(the chance that any of ten billion runs is taken for another is large, and costs three sentences). A run of fewer than
``min_span_words`` words is left alone: "Yes." "No." "Yes." may be said again.

Copies are cut, also within one document, where a run that overlaps its first occurrence loses only what lies behind
that ("a a a a" keeps three). So every sentence that was in the corpus is still in it, but for documents that have fewer
than ``min_words_left`` words after a cut: those are dropped as ``duplicate_sentences``. What is cut from documents that
stay is counted as ``duplicate_sentences_cut``: bytes, and no document.

Memory: a task holds the hashes of its piece (16 bytes a sentence) or one range of keys (matching.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from xxhash import xxh64_intdigest

from data_pipeline.config import DedupSettings
from data_pipeline.dedup.matching import FROM_INDEX, RANGE_BYTES, MatchKeys, count_ranges, read_pairs
from data_pipeline.dedup.normal_form import normal_words
from data_pipeline.dedup.procedure import NO_INDEX, Indexing, signed_documents
from data_pipeline.dedup.records import Layout, write_signatures
from data_pipeline.execution.executors import Executor
from data_pipeline.execution.tally import (
    CountDocuments,
    DocumentWriter,
    DroppedWriter,
    Tally,
    add_to_tally,
    place_of,
    write_tally,
)
from data_pipeline.inputs.readers import DocumentReader, InputFile

LAYOUT = Layout("sentences", buckets=1, columns=1, place=("document", "sentence"))
PAIR = np.dtype([(f"{role}_{name}", "<u4") for role in ("first", "other") for name in ("piece", *LAYOUT.place)])
CUT = np.dtype([("document", "<u4"), ("start", "<u4"), ("stop", "<u4")])
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*")


def split_sentences(text: str) -> list[str]:
    """The sentences of ``text``, each with the space after it; joined they are ``text``."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    starts = [0, *ends]
    return [text[start:stop] for start, stop in zip(starts, [*ends, len(text)], strict=True) if start < stop]


def span_keys(text: str, span: int, min_words: int) -> list[tuple[int, int]]:
    """(hash, first sentence) of each run of ``span`` sentences that has at least ``min_words`` words."""
    words = [normal_words(sentence) for sentence in split_sentences(text)]
    keys = []
    for first in range(len(words) - span + 1):
        run = words[first : first + span]
        if sum(map(len, run)) >= min_words:
            keys.append((xxh64_intdigest("\n".join(map(" ".join, run)).encode()), first))
    return keys


class SignSentences(PipelineStep):
    """Writes the key of every run of sentences of a piece."""

    name = "Ice sentence keys"
    type = "🫂 - DEDUP"

    def __init__(self, folder: Path, span: int, min_words: int) -> None:
        super().__init__()
        self.folder = folder
        self.span = span
        self.min_words = min_words

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Sign one piece."""
        found = [np.empty((0, 3), np.uint64)]
        for position, document in enumerate(data):
            keys = span_keys(document.text, self.span, self.min_words)
            if keys:
                found.append(np.array([(key, position, sentence) for key, sentence in keys], np.uint64))
        rows = np.concatenate(found)
        write_signatures(LAYOUT, self.folder, rank, rows[:, :1, None], [rows[:, 1], rows[:, 2]])


class CollectCuts(PipelineStep):
    """One task: deals what is to be cut to the pieces it is cut from; memory for one file of matches at a time."""

    name = "Ice sentence cuts"
    type = "🫂 - DEDUP"

    def __init__(self, pairs: Path, match_tasks: int, pieces: int, span: int, cuts: Path) -> None:
        super().__init__()
        self.pairs = pairs
        self.match_tasks = match_tasks
        self.pieces = pieces
        self.span = span
        self.cuts = cuts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Read all pairs, write the cuts of every piece."""
        if world_size != 1:
            raise RuntimeError(f"cuts are collected by one task, not {world_size}")
        self.cuts.mkdir(parents=True, exist_ok=True)
        for piece in range(self.pieces):
            cut_file(self.cuts, piece).write_bytes(b"")
        for path in read_pairs(self.pairs, LAYOUT, self.match_tasks):
            pairs = np.fromfile(path, PAIR)
            records = np.empty(len(pairs), CUT)
            records["document"] = pairs["other_document"]
            sentence, first = pairs["other_sentence"], pairs["first_sentence"]
            # Within one document, the first occurrence itself is not touched.
            same = (pairs["first_piece"] == pairs["other_piece"]) & (pairs["first_document"] == records["document"])
            same &= pairs["first_piece"] != FROM_INDEX
            records["start"] = np.where(same, np.maximum(sentence, np.where(same, first, 0) + self.span), sentence)
            records["stop"] = sentence + self.span
            records = records[np.argsort(pairs["other_piece"], kind="stable")]
            start = 0
            for piece, count in zip(*np.unique(pairs["other_piece"], return_counts=True), strict=True):
                with cut_file(self.cuts, piece).open("ab") as file:
                    file.write(records[start : start + count].tobytes())
                start += count


def cut_file(folder: Path, piece: int) -> Path:
    """What is cut from the documents of one piece."""
    return folder / f"{piece:05d}.cuts"


class CutSentences(PipelineStep):
    """Cuts what the list of its piece names, and drops documents of which too little is left."""

    name = "Ice cut sentences"
    type = "🫂 - DEDUP"

    def __init__(
        self, cuts: Path, min_words_left: int, documents: Sequence[int], dropped: DroppedWriter, tally_folder: Path
    ) -> None:
        super().__init__()
        self.cuts = cuts
        self.min_words_left = min_words_left
        self.documents = list(documents)
        self.dropped = dropped
        self.tally_folder = tally_folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass on what stays, as it stays."""
        cuts = np.sort(np.frombuffer(cut_file(self.cuts, rank).read_bytes(), CUT), order="document")
        tally: Tally = {}
        documents = done = 0
        with self.dropped as writer:
            for position, document in enumerate(data):
                documents += 1
                end = int(np.searchsorted(cuts["document"], position, side="right"))
                if end > done:
                    text = without_sentences(document.text, cuts[done:end])
                    done = end
                    if len(normal_words(text)) < max(self.min_words_left, 1):
                        document.metadata["filter_reason"] = "duplicate_sentences"
                        writer.write(document, rank)
                        continue
                    key = f"duplicate_sentences_cut\t{place_of(document)}"
                    add_to_tally(tally, key, len(document.text.encode()) - len(text.encode()), documents=0)
                    document.text = text
                yield document
        if documents != self.documents[rank] or done != len(cuts):
            raise RuntimeError(
                f"{cut_file(self.cuts, rank)}: {documents} documents and {done} cuts, where {self.documents[rank]} "
                f"documents were signed and {len(cuts)} cuts are to be made"
            )
        write_tally(self.tally_folder, rank, tally)


def without_sentences(text: str, cuts: np.ndarray[Any, Any]) -> str:
    """``text`` without the sentences in [start, stop) of any of ``cuts``."""
    sentences = split_sentences(text)
    keep = np.ones(len(sentences), bool)
    for _, start, stop in cuts.tolist():
        keep[start:stop] = False
    return "".join(sentence for sentence, kept in zip(sentences, keep.tolist(), strict=True) if kept).strip()


def remove_duplicate_sentences(
    executor: Executor,
    files: Sequence[InputFile],
    folder: Path,
    settings: DedupSettings,
    indexing: Indexing = NO_INDEX,
    range_bytes: int = RANGE_BYTES,
) -> None:
    """Keep each passage once; results in ``folder/documents``."""
    scratch, logs, pieces = folder / "scratch", folder / "logs", len(files)
    signatures, pairs, cuts = (scratch / name for name in ("signatures", "pairs", "cuts"))
    sign = SignSentences(signatures, settings.sentence_span, settings.min_span_words)
    signing = [DocumentReader(files), CountDocuments(folder / "tallies" / "signed"), sign]
    executor.run(signing, pieces, logs / "1_signatures")
    documents = signed_documents(folder, pieces)
    ranges = count_ranges(LAYOUT, signatures, pieces, range_bytes)
    keep_index = folder / "index" / LAYOUT.kind if indexing.keep else None
    match = MatchKeys(LAYOUT, signatures, pieces, ranges, pairs, indexing.earlier, keep_index)
    executor.run([match], ranges, logs / "2_matches")
    executor.run([CollectCuts(pairs, ranges, pieces, settings.sentence_span, cuts)], 1, logs / "3_cuts")
    dropped = DroppedWriter(folder / "dropped", folder / "tallies" / "dropped")
    cutting = [
        DocumentReader(files),
        CutSentences(cuts, settings.min_words_left, documents, dropped, folder / "tallies" / "dropped_cut"),
        CountDocuments(folder / "tallies" / "kept"),
        DocumentWriter(folder / "documents"),
    ]
    executor.run(cutting, pieces, logs / "4_cut")
