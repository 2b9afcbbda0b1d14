"""Train or validation, by a keyed hash of the document's own text.

So the answer never depends on file order, on the number of tasks or on what else is in the corpus, and identical texts
always land on the same side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import SplitSettings
from data_pipeline.execution.document_files import StageWriter
from data_pipeline.execution.tally import CountDocuments
from data_pipeline.inputs.readers import DocumentReader, InputFile

SPLITS = ("train", "validation")


def text_fraction(text: str, purpose: bytes, seed: int = 0) -> float:
    """A number in [0, 1), uniform over texts, independent between purposes and seeds."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose, key=seed.to_bytes(8, "little")).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def split_of(text: str, settings: SplitSettings) -> str:
    """``"validation"`` for a ``validation_fraction`` of all texts, else ``"train"``."""
    held_out = text_fraction(text, b"split", settings.seed) < settings.validation_fraction
    return "validation" if held_out else "train"


class AssignSplit(PipelineStep):
    """Writes ``split`` into each document's metadata."""

    name = "Ice split"
    type = "✂️ - SPLIT"

    def __init__(self, settings: SplitSettings) -> None:
        super().__init__()
        self.settings = settings

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Pass every document on, assigned."""
        for document in data:
            document.metadata["split"] = split_of(document.text, self.settings)
            yield document


def split_pipeline(files: Sequence[InputFile], settings: SplitSettings, folder: Path) -> list[PipelineStep]:
    """Documents into ``folder/train`` and ``folder/validation``; a task without documents of a split writes none."""
    return [
        DocumentReader(files),
        CountDocuments(folder / "tallies" / "kept"),
        AssignSplit(settings),
        StageWriter(folder, "${split}/${rank}"),
    ]
