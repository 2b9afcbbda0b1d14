"""Planted duplicates: how many pairs of a known similarity are found, and does anything go that should stay?

Texts are runs of words that occur nowhere else, so the similarity of two of them is under control: a pair shares its
first words and nothing after, and its Jaccard similarity is counted as a fraction of two sets of n-grams, by code that
shares nothing with MinHash. Found pairs are compared with the theory, ``1 - (1 - s^r)^b``, and each count of pairs with
the binomial distribution of that probability.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import DedupSettings
from data_pipeline.dedup.exact import remove_exact_duplicates
from data_pipeline.dedup.minhash import remove_near_duplicates
from data_pipeline.execution.executors import Executor
from data_pipeline.execution.tally import read_tallies
from data_pipeline.inputs.readers import InputFile, read_documents, stage_files

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS_A_TEXT = 200


@dataclass(frozen=True)
class PlantedRow:
    """Pairs of one similarity: how many there were, how many were found, and how many should be."""

    similarity: float
    pairs: int
    found: int
    expected_fraction: float

    @property
    def found_fraction(self) -> float:
        """Recall."""
        return self.found / self.pairs

    @property
    def tail_probability(self) -> float:
        """How likely a count as far from the expected one, on the same side, is by chance."""
        low = binomial_tail(self.pairs, self.expected_fraction, self.found)
        high = binomial_tail(self.pairs, 1 - self.expected_fraction, self.pairs - self.found)
        return min(low, high)


@dataclass(frozen=True)
class PlantedStudy:
    """The result: near copies by similarity, exact copies, and texts that should have stayed."""

    rows: tuple[PlantedRow, ...]
    exact_pairs: int
    exact_found: int
    unrelated: int
    unrelated_removed: int
    not_the_first_kept: int


def probability_found(similarity: float, settings: DedupSettings) -> float:
    """``1 - (1 - s^r)^b``: the theory."""
    return 1 - (1 - similarity**settings.hashes_per_bucket) ** settings.buckets


def binomial_tail(n: int, p: float, k: int) -> float:
    """The probability of at most ``k`` successes in ``n`` trials of probability ``p``; exact but for rounding."""
    if p in (0.0, 1.0):
        return 1.0 if p == 0.0 or k >= n else 0.0
    log_odds = (math.log(p), math.log1p(-p))
    terms = (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_odds[0] + (n - i) * log_odds[1]
        for i in range(k + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def jaccard(first: str, second: str, n: int) -> float:
    """The similarity of the sets of n-grams of two texts of plain words."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}

    one, other = grams(first), grams(second)
    return len(one & other) / len(one | other)


def _words(generator: random.Random, count: int) -> list[str]:
    return ["".join(generator.choices(LETTERS, k=8)) for _ in range(count)]


def planted_pair(generator: random.Random, similarity: float, n: int) -> tuple[str, str]:
    """Two texts whose similarity is as near to ``similarity`` as texts of this length allow."""
    grams = WORDS_A_TEXT - n + 1
    common = round(similarity * 2 * grams / (1 + similarity))  # s = c / (2 g - c)
    shared = _words(generator, common + n - 1) if common else []
    first, second = (shared + _words(generator, WORDS_A_TEXT - len(shared)) for _ in range(2))
    return " ".join(first), " ".join(second)


def _write_corpus(folder: Path, documents: Sequence[tuple[str, str]], pieces: int) -> list[InputFile]:
    folder.mkdir(parents=True)
    files = []
    size = -(-len(documents) // pieces)
    for piece in range(pieces):
        path = folder / f"{piece:05d}.jsonl"
        part = documents[piece * size : (piece + 1) * size]
        path.write_text("".join(json.dumps({"id": name, "text": text, "domain": "made"}) + "\n" for name, text in part))
        files.append(InputFile(path))
    return files


def run_planted_study(
    executor: Executor,
    folder: Path,
    settings: DedupSettings,
    similarities: Sequence[float],
    pairs: int,
    seed: int = 0,
    pieces: int = 4,
) -> PlantedStudy:
    """Plant ``pairs`` of each similarity, as many exact copies and texts without a copy; remove duplicates; count.

    The copies lie anywhere in the corpus. Needs an empty or new ``folder``.
    """
    generator = random.Random(seed)
    documents: list[tuple[str, str]] = []
    exact_similarity: dict[str, float] = {}
    for level, similarity in enumerate(similarities):
        for pair in range(pairs):
            texts = planted_pair(generator, similarity, settings.ngram)
            exact_similarity[f"near/{level}/{pair}"] = jaccard(*texts, settings.ngram)
            documents += [(f"near/{level}/{pair}", text) for text in texts]
    for pair in range(pairs):
        documents += [(f"exact/0/{pair}", " ".join(_words(generator, WORDS_A_TEXT)))] * 2
    documents += [(f"unrelated/0/{text}", " ".join(_words(generator, WORDS_A_TEXT))) for text in range(pairs)]
    generator.shuffle(documents)
    first_text: dict[str, str] = {}
    for name, text in documents:
        first_text.setdefault(name, text)

    files = _write_corpus(folder / "corpus", documents, pieces)
    remove_exact_duplicates(executor, files, folder / "exact")
    remove_near_duplicates(executor, stage_files(folder / "exact" / "documents"), folder / "near", settings)
    kept = dict(Counter(name for name, _ in _documents(folder / "near" / "documents")))
    not_first = sum(
        kept[name] == 1 and text != first_text[name] for name, text in _documents(folder / "near" / "documents")
    )
    rows = []
    for level in range(len(similarities)):
        names = [f"near/{level}/{pair}" for pair in range(pairs)]
        similarity = sum(exact_similarity[name] for name in names) / pairs
        found = sum(kept[name] == 1 for name in names)
        rows.append(PlantedRow(similarity, pairs, found, probability_found(similarity, settings)))
    removed_exactly = sum(counts["documents"] for counts in read_tallies(folder / "exact/tallies/dropped").values())
    return PlantedStudy(
        rows=tuple(rows),
        exact_pairs=pairs,
        exact_found=removed_exactly,
        unrelated=pairs,
        unrelated_removed=sum(f"unrelated/0/{text}" not in kept for text in range(pairs)),
        not_the_first_kept=not_first,
    )


def _documents(folder: Path) -> Iterator[tuple[str, str]]:
    for file in stage_files(folder):
        for document in read_documents(file):
            yield document.id, document.text
