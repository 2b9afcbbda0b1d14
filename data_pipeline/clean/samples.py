"""A few documents for each reason, kept and dropped, for people to judge the rules by.

A sample is the documents with the smallest hashes of their text: random as far as rules can tell, the same on every
run, and the sample of the whole is the smallest of the samples of the pieces, however the work was divided.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from pathlib import Path

from xxhash import xxh3_64_intdigest

from data_pipeline.clean.personal_information import replace_personal_information
from data_pipeline.clean.settings import PersonalInformationSettings

SAMPLES_FOLDER = "samples"
SAMPLES_PER_REASON = 4
EXCERPT_CHARACTERS = 1500
KEPT = "kept"


@dataclass(frozen=True, order=True)
class Sample:
    """The beginning of a document, ``size_bytes`` long in all; ordered by the hash of its whole text."""

    text_hash: int
    identity: str
    domain: str
    size_bytes: int
    excerpt: str


class Samples:
    """The samples of one piece, by reason; addresses of people are replaced."""

    def __init__(self, size: int = SAMPLES_PER_REASON) -> None:
        self.size = size
        self._heaps: dict[str, list[tuple[int, Sample]]] = {}

    def offer(self, reason: str, text: str, identity: str, domain: str) -> None:
        """Consider a document that was dropped for ``reason``, or ``"kept"``."""
        encoded = text.encode()
        text_hash = xxh3_64_intdigest(encoded)
        heap = self._heaps.setdefault(reason, [])
        if len(heap) == self.size and -text_hash <= heap[0][0]:
            return
        excerpt = replace_personal_information(text[:EXCERPT_CHARACTERS], PersonalInformationSettings())
        item = (-text_hash, Sample(text_hash, identity, domain, len(encoded), excerpt))
        (heapq.heappush if len(heap) < self.size else heapq.heappushpop)(heap, item)

    def by_reason(self) -> dict[str, list[Sample]]:
        """The samples of each reason, in order of the hash."""
        return {reason: sorted(sample for _, sample in heap) for reason, heap in sorted(self._heaps.items())}

    def write(self, folder: Path, rank: int) -> None:
        """Write the samples of piece ``rank``."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            reason: [list(vars(sample).values()) for sample in samples] for reason, samples in self.by_reason().items()
        }
        (folder / f"{rank:05d}.json").write_text(json.dumps(values))


def read_samples(folder: Path, size: int = SAMPLES_PER_REASON) -> dict[str, list[Sample]]:
    """The samples of all pieces together, by reason: those with the smallest hashes, in order."""
    merged: dict[str, list[Sample]] = {}
    for path in sorted(folder.glob("[0-9]*.json")):
        for reason, values in json.loads(path.read_text()).items():
            found = [Sample(*value) for value in values]
            merged[reason] = sorted([*merged.get(reason, []), *found])[:size]
    return merged
