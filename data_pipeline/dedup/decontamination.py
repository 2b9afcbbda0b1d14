"""Documents that contain items of evaluation sets go, or lose the passage, so that an evaluation measures no memory.

A document is contaminated when it has n consecutive normal words of an item (evaluation_sets.py; n = 13 as in Brown et
al. 2020). With ``action = "drop"`` it is dropped as ``contaminated_SET``, the first of the sets it touches. With
``"cut"`` the words that match go, with what is written between them, and a blank line takes their place, until nothing
matches. A document left with fewer than ``min_words_left`` words is dropped under the same name; what is cut from the
others is counted as ``contaminated_cut``: bytes, and no document.

``dropped/matches/PIECE.jsonl`` lists every contaminated document with the items and the first words that matched, and
``tallies/decontamination.json`` sums it up for each set.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import DecontaminationSettings
from data_pipeline.dedup.evaluation_sets import EvaluationTable, Hit, build_table
from data_pipeline.dedup.normal_form import Words, word_spans
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
from launch.files import write_json_atomically

SUMMARY = Path("tallies") / "decontamination.json"
MATCHES = Path("dropped") / "matches"


def without_matches(text: str, table: EvaluationTable) -> str:
    """``text`` without any passage that matches, also none that arises where one was cut."""
    while hits := table.hits(Words.of(text)):
        spans = word_spans(text)
        kept, end = [], 0
        for hit in sorted(hits, key=lambda hit: hit.start):
            start, stop = spans[hit.start][0], spans[hit.start + hit.length - 1][1]
            if start > end:
                kept.append(text[end:start].strip())
            end = max(end, stop)
        kept.append(text[end:].strip())
        text = "\n\n".join(filter(None, kept))
    return text


class Decontaminate(PipelineStep):
    """Drops or cuts the documents of a piece, and lists them."""

    name = "Ice decontamination"
    type = "🦠 - DECONT"

    def __init__(
        self, table: EvaluationTable, settings: DecontaminationSettings, folder: Path, dropped: DroppedWriter
    ) -> None:
        super().__init__()
        self.table = table
        self.settings = settings
        self.folder = folder
        self.dropped = dropped

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass on what stays, as it stays."""
        tally: Tally = {}
        matches = self.folder / MATCHES / f"{rank:05d}.jsonl"
        matches.parent.mkdir(parents=True, exist_ok=True)
        with self.dropped as writer, matches.open("w", encoding="utf-8") as listed:
            for document in data:
                words = Words.of(document.text)
                hits = self.table.hits(words)
                if not hits:
                    yield document
                    continue
                cut = None
                if self.settings.action == "cut":
                    text = without_matches(document.text, self.table)
                    if len(Words.of(text)) >= max(self.settings.min_words_left, 1):
                        cut = len(document.text.encode()) - len(text.encode())
                match = self._describe(document, words, hits, cut)
                listed.write(json.dumps(match) + "\n")
                if cut is None:
                    document.metadata["filter_reason"] = f"contaminated_{next(iter(match['items']))}"
                    document.metadata["contaminated_words"] = match["words"]
                    writer.write(document, rank)
                else:
                    add_to_tally(tally, f"contaminated_cut\t{place_of(document)}", cut, documents=0)
                    document.text = text
                    yield document
        write_tally(self.folder / "tallies" / "dropped_cut", rank, tally)

    def _describe(self, document: Document, words: Words, hits: Sequence[Hit], cut: int | None) -> dict[str, Any]:
        items: dict[str, list[int]] = {}
        for set_number, item in sorted({item for hit in hits for item in self.table.items_of(hit)}):
            items.setdefault(self.settings.sets[set_number].name, []).append(item)
        first = min(hits, key=lambda hit: hit.start)
        matched = words.buffer[words.starts[first.start] : words.ends[first.start + first.length - 1]]
        return {
            "id": document.id,
            "domain": document.metadata["domain"],
            "origin": document.metadata.get("origin"),
            "items": items,
            "words": matched.decode("utf-8", "replace"),
            "cut_bytes": cut,
        }


def summarise(folder: Path, counts: dict[str, dict[str, int]], pieces: int) -> dict[str, dict[str, int]]:
    """For each set: its items, how many were too short to look for or were found, and in how many documents."""
    touched: dict[str, set[int]] = {name: set() for name in counts}
    summary = {name: {**values, "documents_dropped": 0, "documents_cut": 0} for name, values in counts.items()}
    for piece in range(pieces):
        with (folder / MATCHES / f"{piece:05d}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                match = json.loads(line)
                for name, items in match["items"].items():
                    touched[name].update(items)
                    summary[name]["documents_dropped" if match["cut_bytes"] is None else "documents_cut"] += 1
    return {name: {**values, "items_found": len(touched[name])} for name, values in summary.items()}


def read_summary(folder: Path) -> dict[str, dict[str, int]]:
    """The summary in a finished stage's folder; {} for another stage's."""
    path = folder / SUMMARY
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def decontaminate(
    executor: Executor, files: Sequence[InputFile], folder: Path, settings: DecontaminationSettings
) -> None:
    """Take the evaluation sets out of ``files``; results in ``folder/documents``."""
    table = folder / "scratch" / "table"
    counts = build_table(settings, table)
    dropped = DroppedWriter(folder / "dropped", folder / "tallies" / "dropped")
    pipeline = [
        DocumentReader(files),
        CountDocuments(folder / "tallies" / "searched"),
        Decontaminate(EvaluationTable(table), settings, folder, dropped),
        CountDocuments(folder / "tallies" / "kept"),
        DocumentWriter(folder / "documents"),
    ]
    executor.run(pipeline, len(files), folder / "logs")
    write_json_atomically(folder / SUMMARY, summarise(folder, counts, len(files)))
