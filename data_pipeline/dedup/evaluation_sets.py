"""Evaluation sets as sorted arrays of hashed n-grams, for finding their items in a corpus.

An item is looked for by every run of n consecutive normal words (normal_form.py) of each of its fields, and of its
fields one after the other. A field, or an item, of fewer than n words is looked for whole if it has at least
``min_words``; a shorter one would be found everywhere, is not looked for, and is counted.

The hash of words with hashes w_1 ... w_k is ``w_1 M^(k-1) + ... + w_k mod 2^64``, computed for all positions of a text
and all lengths up to n in n passes (Horner). A hit is a position whose hash is in the sorted array of its length. What
is in an evaluation set is always found; what is not is found with probability 2^-64 for each pair of n-grams.

Memory: 8 bytes an n-gram and 12 bytes a mention of it, in memory-mapped files that all tasks of a machine share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config import DecontaminationSettings, EvaluationSetSettings
from data_pipeline.dedup.normal_form import Hashes, Words
from data_pipeline.inputs.formats import compression_of
from data_pipeline.inputs.jsonl import required_object
from data_pipeline.inputs.parts import BadRecord
from data_pipeline.inputs.streams import StoredFile, cannot_read, decompressed, lines
from launch.files import write_json_atomically
from launch.settings import BadInputError, read_json_object

MULTIPLIER = np.uint64(0x9E3779B97F4A7C17)
MAX_ITEM_BYTES = 2**26
MENTION = np.dtype([("set", "<u4"), ("item", "<u4")])


@dataclass(frozen=True)
class Hit:
    """A run of ``length`` words from word ``start`` on that is in an evaluation set; ``entry`` is its row there."""

    start: int
    length: int
    entry: int


def read_items(settings: EvaluationSetSettings, setting: str) -> Iterator[list[str]]:
    """The texts of each item's fields. Raises ``BadInputError`` for a file or an item that is not as described."""
    path = Path(settings.path)
    try:
        opened = open(path, "rb", buffering=0)  # noqa: SIM115 - StoredFile closes it
    except OSError as error:
        raise cannot_read(f"{setting}.path = {settings.path!r}", error) from None
    number = 0
    with StoredFile(opened, str(path)) as stored:
        for _, line in lines(decompressed(stored, compression_of(path.name)), MAX_ITEM_BYTES):
            number += 1
            if isinstance(line, BadRecord):
                raise BadInputError(f"{path}: item {number} cannot be read ({line.problem}); replace the file")
            if line.strip():
                yield _fields(line, settings, path, number)


def check_evaluation_sets(settings: DecontaminationSettings) -> None:
    """Read every item once, so that a mistake shows before hours of work. Raises ``BadInputError``."""
    for position, entry in enumerate(settings.sets):
        setting = f"decontamination.sets.{position}"
        items = sum(1 for _ in read_items(entry, setting))
        if not items:
            raise BadInputError(f"{setting}.path = {entry.path!r}: has no item; give a file with some")


def _fields(line: bytes, settings: EvaluationSetSettings, path: Path, number: int) -> list[str]:
    values = required_object(line, f"{path}: item {number}", "fields")
    texts = []
    for field in settings.fields:
        if field not in values:
            known = ", ".join(sorted(values)) or "none"
            raise BadInputError(f"{path}: item {number}: has no field {field!r} (it has {known}); correct fields")
        value = values[field]
        parts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(part, str | int | float) for part in parts):
            raise BadInputError(f"{path}: item {number}: {field!r} is not a text, a number or a list of such")
        texts.append(" ".join(map(str, parts)))
    return texts


def gram_hashes(word_hashes: Hashes, lengths: Sequence[int]) -> Iterator[tuple[int, Hashes]]:
    """For each of ``lengths`` (ascending), the hash of the run of that many words at each position where it fits."""
    if not lengths:
        return
    wanted, rolling = set(lengths), np.zeros(len(word_hashes), np.uint64)
    for length in range(1, min(lengths[-1], len(word_hashes)) + 1):
        rolling = rolling[: len(word_hashes) - length + 1] * MULTIPLIER + word_hashes[length - 1 :]
        if length in wanted:
            yield length, rolling


def build_table(settings: DecontaminationSettings, folder: Path) -> dict[str, dict[str, int]]:
    """Write the table of all sets to ``folder``; returns for each set its items, and how many are too short.

    The order of files and of items changes nothing but the numbers that items are called by.
    """
    found: dict[int, tuple[list[Hashes], list[np.ndarray[Any, Any]]]] = {}
    counts: dict[str, dict[str, int]] = {}
    check_evaluation_sets(settings)
    for set_number, entry in enumerate(settings.sets):
        items = too_short = 0
        for item, fields in enumerate(read_items(entry, f"decontamination.sets.{set_number}")):
            items += 1
            texts = dict.fromkeys([*fields, " ".join(fields)])
            searched = False
            for text in texts:
                hashes = Words.of(text).ngram_hashes(1)
                length = min(len(hashes), settings.ngram)
                if length < settings.min_words:
                    continue
                searched = True
                grams = np.unique(next(gram_hashes(hashes, [length]))[1])
                of_length = found.setdefault(length, ([], []))
                of_length[0].append(grams)
                mentions = np.empty(len(grams), MENTION)
                mentions["set"], mentions["item"] = set_number, item
                of_length[1].append(mentions)
            too_short += not searched
        counts[entry.name] = {"items": items, "items_too_short": too_short}
    folder.mkdir(parents=True)
    for length, (parts, mention_parts) in sorted(found.items()):
        grams, mentions = np.concatenate(parts), np.concatenate(mention_parts)
        order = np.lexsort([mentions["item"], mentions["set"], grams])
        unique, starts = np.unique(grams[order], return_index=True)
        np.save(folder / f"grams_{length:03d}.npy", unique.astype("<u8"), allow_pickle=False)
        np.save(folder / f"starts_{length:03d}.npy", starts.astype("<u8"), allow_pickle=False)
        np.save(folder / f"mentions_{length:03d}.npy", mentions[order], allow_pickle=False)
    write_json_atomically(folder / "lengths.json", {"lengths": sorted(found)})
    return counts


class EvaluationTable:
    """The table that :func:`build_table` wrote, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def lengths(self) -> list[int]:
        """How many words the n-grams have, ascending."""
        return list(read_json_object(self.folder / "lengths.json")["lengths"])

    @cached_property
    def _arrays(self) -> dict[int, tuple[npt.NDArray[Any], ...]]:
        names = ("grams", "starts", "mentions")
        return {
            length: tuple(
                np.load(self.folder / f"{name}_{length:03d}.npy", mmap_mode="r", allow_pickle=False) for name in names
            )
            for length in self.lengths
        }

    def hits(self, words: Words) -> list[Hit]:
        """Where ``words`` has an n-gram of an evaluation set; by length, then position."""
        found = []
        for length, hashes in gram_hashes(words.ngram_hashes(1), self.lengths):
            grams = self._arrays[length][0]
            rows = np.searchsorted(grams, hashes)
            rows[rows == len(grams)] = 0
            for start in np.flatnonzero(grams[rows] == hashes).tolist():
                found.append(Hit(start, length, int(rows[start])))
        return found

    def items_of(self, hit: Hit) -> list[tuple[int, int]]:
        """(set, item) of every item that has the n-gram of ``hit``."""
        _, starts, mentions = self._arrays[hit.length]
        start = int(starts[hit.entry])
        stop = int(starts[hit.entry + 1]) if hit.entry + 1 < len(starts) else len(mentions)
        return sorted({(int(row["set"]), int(row["item"])) for row in mentions[start:stop]})
