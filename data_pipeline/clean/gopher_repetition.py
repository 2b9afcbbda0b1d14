"""Gopher's rules against repetition (Rae et al. 2021, arXiv:2112.11446, table A1).

Decisions and reasons are those of datatrove's ``GopherRepetitionFilter`` given the same words. That filter builds every
n-gram as a string, for nine values of n, and takes half the time of all cleaning. Here most pages are cleared by *upper
bounds* that cost a few array operations, and only a page that a bound cannot clear is counted exactly:

1. Every run of words has a hash, of its characters without the spaces between words. With ``c_k`` the characters and
   ``B`` odd, ``S_k = c_0 B^0 + ... + c_{k-1} B^{k-1} mod 2^64`` is one cumulative sum, and the run of characters i to j
   has the hash ``(S_j - S_i) B^{-i}``: all n-grams of all n from the same sum.
2. Equal n-grams have equal hashes, so counting hashes never counts an n-gram too seldom. A collision can only cost
   time.
3. Paragraphs and lines are compared as strings. ``top_n_gram``: count times length of the commonest n-gram is at most
   (largest count of a hash) x (longest n-gram). ``duplicated_n_n_grams``: the filter adds up n-grams seen before, at
   most (hashes that occurred before) x (longest n-gram); and only where a hash occurs twice need it look.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from data_pipeline.clean.characters import SPACE
from data_pipeline.clean.rules import Rule, count_duplicates, over
from data_pipeline.clean.settings import GopherRepetitionSettings
from data_pipeline.clean.words import Page

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]

_BASE = 0x9E3779B97F4A7C15 | 1
_BASE_INVERSE = pow(_BASE, -1, 2**64)
_KEPT_POWERS = 1 << 20


def _powers(base: int, count: int) -> Hashes:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers, out=powers)


class _PowerTable:
    """``base ** k mod 2**64`` for k = 0, 1, ...; grows with the longest page, up to 8 MB that are kept."""

    def __init__(self, base: int) -> None:
        self.base = base
        self._kept = _powers(base, 1)

    def first(self, count: int) -> Hashes:
        """The powers 0 to ``count - 1``."""
        if count <= self._kept.size:
            return self._kept[:count]
        powers = _powers(self.base, max(count, min(2 * count, _KEPT_POWERS)))
        if count <= _KEPT_POWERS:
            self._kept = powers
        return powers[:count]


_FORWARD, _BACKWARD = _PowerTable(_BASE), _PowerTable(_BASE_INVERSE)


class NgramHashes:
    """The hashes and lengths of a page's n-grams, for any n from one pass over its characters."""

    def __init__(self, page: Page) -> None:
        lengths = page.ends - page.starts
        self.n_words = page.n_words
        self.offsets = np.zeros(lengths.size + 1, dtype=np.int64)  # of words, in the text without spaces
        np.cumsum(lengths, out=self.offsets[1:])
        visible = page.codes[(page.bits & SPACE) == 0]  # what words are made of
        terms = visible.astype(np.uint64)
        terms += np.uint64(1)
        terms *= _FORWARD.first(terms.size)
        sums = np.zeros(terms.size + 1, dtype=np.uint64)
        np.cumsum(terms, out=sums[1:])
        self._sums = sums[self.offsets]
        self._shifts = _BACKWARD.first(terms.size + 1)[self.offsets]
        self._count_at = (0, self.n_words)

    def of(self, n: int) -> Hashes:
        """The hash of each n-gram, in order; uint64 (n_words - n + 1,), empty when there are fewer than n words."""
        if self.n_words < n:
            return np.empty(0, dtype=np.uint64)
        return (self._sums[n:] - self._sums[:-n]) * self._shifts[:-n]

    def lengths(self, n: int) -> NDArray[np.int64]:
        """The characters of each n-gram without spaces; int64 (n_words - n + 1,)."""
        return self.offsets[n:] - self.offsets[:-n]

    def common_bound(self, n: int, enough: float) -> int:
        """At least count times length (with spaces) of the commonest n-gram; loose if that suffices: <= ``enough``.

        No n-gram is commoner than the commonest shorter one, so a count found for a smaller n often serves.
        """
        if self.n_words < n:
            return 0
        longest = int(self.lengths(n).max()) + n - 1
        at, count = self._count_at
        if at <= n and count * longest <= enough:
            return count * longest
        count = _largest_count(np.sort(self.of(n)))
        self._count_at = (n, count)
        return count * longest


def _largest_count(ordered: Hashes) -> int:
    """How often the commonest of the sorted ``ordered`` occurs."""
    borders = np.flatnonzero(ordered[1:] != ordered[:-1])
    if borders.size == ordered.size - 1:
        return 1
    inner = int((borders[1:] - borders[:-1]).max()) if borders.size > 1 else 0
    return max(inner, int(borders[0]) + 1, ordered.size - 1 - int(borders[-1])) if borders.size else ordered.size


def _top_ngram_characters(words: list[str], n: int) -> int:
    """Count times length of the commonest n-gram, of those equally common the first."""
    ngrams = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    ngram, count = ngrams.most_common(1)[0]
    return count * (sum(map(len, ngram)) + n - 1)


def _repetitions(hashes: NgramHashes, n: int, enough: float) -> tuple[int, Places]:
    """A bound on what :func:`_duplicate_ngram_characters` gives, and where it has to look if that is not ``enough``."""
    of_ngrams = hashes.of(n)
    if not of_ngrams.size:
        return 0, np.empty(0, dtype=np.int64)
    ordered = np.sort(of_ngrams)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]  # each n-gram as often as it came before
    bound = repeated.size * int(hashes.lengths(n).max())
    if bound <= enough:
        return bound, np.empty(0, dtype=np.int64)
    nearest = repeated[np.minimum(np.searchsorted(repeated, of_ngrams), repeated.size - 1)]
    return bound, np.flatnonzero(nearest == of_ngrams)


def _duplicate_ngram_characters(page: Page, n: int, places: Places) -> int:
    """The characters of n-grams that came before; what one of them covers is not looked at again.

    As in datatrove, n-grams are compared without the spaces between words. ``places`` are those with a hash that
    occurs twice: an n-gram elsewhere has no equal, so it is neither counted nor found again.
    """
    text, starts, ends = page.text, page.starts[places].tolist(), page.ends[places + n - 1].tolist()
    seen: set[str] = set()
    characters = free_from = 0
    for place, start, end in zip(places.tolist(), starts, ends, strict=True):
        if place < free_from:
            continue
        ngram = "".join(text[start:end].split())
        if ngram in seen:
            characters += len(ngram)
            free_from = place + n
        else:
            seen.add(ngram)
    return characters


def _paragraphs(text: str) -> list[str]:
    r"""What stands between empty lines; equal to splitting at ``\n{2,}``, in a quarter of the time."""
    parts = [part.removeprefix("\n") for part in text.strip().split("\n\n")]
    return [part for part in parts if part] or [""]


def _lines(text: str) -> list[str]:
    r"""Equal to splitting at ``\n+``: an empty line counts at the beginning and at the end of the text only."""
    lines = [line for line in text.split("\n") if line]
    return lines + [""] * (text.startswith("\n") + text.endswith("\n"))


def gopher_repetition_rule(settings: GopherRepetitionSettings) -> Rule:
    """The rules in datatrove's order: paragraphs, lines, commonest n-grams, repeated n-grams."""

    def repeated_lines(text: str) -> str | None:
        paragraphs = _paragraphs(text)
        count, characters = count_duplicates(paragraphs)
        if over(count / len(paragraphs), settings.max_duplicate_paragraphs):
            return "dup_para_frac"
        if over(characters / len(text), settings.max_duplicate_paragraph_characters):
            return "dup_para_char_frac"
        lines = _lines(text)
        count, characters = count_duplicates(lines)
        if over(count / len(lines), settings.max_duplicate_lines):
            return "dup_line_frac"
        if over(characters / len(text), settings.max_duplicate_line_characters):
            return "dup_line_char_frac"
        return None

    def rule(page: Page) -> str | None:
        if not page.text:
            return "empty"
        reason = repeated_lines(page.text)
        if reason or not page.n_words:
            return reason
        hashes, size = NgramHashes(page), len(page.text)

        def exceeds(characters: int, limit: float) -> bool:
            return characters / size > limit

        # Bounds are compared in the same way as counts: then rounding cannot clear what the count would not.
        for n, limit in settings.top_ngrams:
            bound = hashes.common_bound(n, limit * size)
            if exceeds(bound, limit) and exceeds(_top_ngram_characters(page.words, n), limit):
                return f"top_{n}_gram"
        for n, limit in settings.duplicate_ngrams:
            bound, places = _repetitions(hashes, n, limit * size)
            if exceeds(bound, limit) and exceeds(_duplicate_ngram_characters(page, n, places), limit):
                return f"duplicated_{n}_n_grams"
        return None

    return rule
