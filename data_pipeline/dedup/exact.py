"""Identical texts once.

The key of a text is its 128-bit xxh3. With 64 bits, as datatrove has by default, ten billion different documents would
be expected to lose nearly three to chance; with 128 bits the chance that any is lost is 1e-19.

``exact_text`` says what must be equal: the ``plain`` text, or its ``normalised`` form: letters and digits only, without
regard to case, diacritics, punctuation and space. A text of punctuation only has no such form and is compared as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datatrove.pipeline.base import PipelineStep
from xxhash import xxh3_128_digest

from data_pipeline.dedup.normal_form import simplify
from data_pipeline.dedup.procedure import NO_INDEX, Indexing, remove_duplicates
from data_pipeline.dedup.records import Layout, write_signatures
from data_pipeline.execution.executors import Executor
from data_pipeline.inputs.readers import InputFile

ExactText = Literal["plain", "normalised"]

LAYOUT = Layout("exact", buckets=1, columns=2)


def exact_digest(text: str, compared: ExactText) -> bytes:
    """The 16 bytes that two exact duplicates share."""
    if compared == "normalised":
        text = simplify(text, numbers=False) or text
    return xxh3_128_digest(text.encode())


class SignExact(PipelineStep):
    """Writes the key of every document of a piece."""

    name = "Ice exact keys"
    type = "🫂 - DEDUP"

    def __init__(self, folder: Path, compared: ExactText) -> None:
        super().__init__()
        self.folder = folder
        self.compared: ExactText = compared

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Sign one piece."""
        digests = [exact_digest(document.text, self.compared) for document in data]
        keys = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 1, 2)
        write_signatures(LAYOUT, self.folder, rank, keys, [np.arange(len(keys))])


def remove_exact_duplicates(
    executor: Executor,
    files: Sequence[InputFile],
    folder: Path,
    compared: ExactText = "plain",
    indexing: Indexing = NO_INDEX,
) -> None:
    """Keep the first of each group of identical texts; results in ``folder/documents``."""
    sign = SignExact(folder / "scratch" / "signatures", compared)
    remove_duplicates(executor, files, folder, LAYOUT, sign, "exact_duplicate", indexing)
