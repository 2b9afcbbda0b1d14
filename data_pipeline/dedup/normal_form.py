"""The form in which texts are compared: what differs in form only must become equal.

``simplify`` gives exactly datatrove's ``simplify_text`` with its default settings (lower case, numbers as 0,
punctuation as spaces, single spaces, no diacritics) in about a quarter of the time: ASCII needs neither the ``regex``
module nor a pass over every character. ``normal_words`` cuts it into the words that the filters see
(``clean/words.py``), and :class:`Words` holds them in one buffer of UTF-8 in which every run of n words is a slice, so
an n-gram costs one slice and one hash and is never joined from strings.

Han and Hiragana characters are a word each; other scripts without spaces (Thai, Khmer) give few and long words, so
near-duplicate search and decontamination find less there.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from datatrove.utils.text import NUMBERS_PATTERN, PUNCTUATION, PUNCTUATION_TRANS
from xxhash import xxh64_intdigest

from data_pipeline.clean.words import Page

Hashes = npt.NDArray[np.uint64]

_ASCII_NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)?")
_PUNCTUATION = re.compile("[" + re.escape(PUNCTUATION) + "]")
_CHUNK = re.compile(r"\S+")
_SPACE = 32


@functools.cache
def _marks() -> frozenset[str]:
    """The characters of category Mn, from the table that datatrove asks about every character of a text."""
    return frozenset(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == "Mn")


def simplify(text: str, *, numbers: bool = True) -> str:
    """``text`` without what form adds: equal to datatrove's ``simplify_text``; ``numbers=False`` keeps numbers."""
    text = text.lower()
    if text.isascii():
        if numbers:
            text = _ASCII_NUMBER.sub("0", text)
        return " ".join(text.translate(PUNCTUATION_TRANS).split())
    if numbers:
        text = NUMBERS_PATTERN.sub("0", text)
    text = " ".join(_PUNCTUATION.sub(" ", text).split())
    text = unicodedata.normalize("NFD", text)
    for mark in _marks().intersection(text):
        text = text.replace(mark, "")
    return text.strip()


def normal_words(text: str) -> list[str]:
    """The words that de-duplication and decontamination compare."""
    # Without ASCII punctuation, what stands between the spaces is what the word splitter would find.
    return simplify(text).split() if text.isascii() else Page(simplify(text)).words


def word_spans(text: str) -> list[tuple[int, int]]:
    """For each of the ``normal_words``, the characters of ``text`` that it comes from, up to the spaces around them.

    Slow, for the few texts of which a passage is to be removed.
    """
    return [chunk.span() for chunk in _CHUNK.finditer(text) for _ in normal_words(chunk.group())]


@dataclass(frozen=True)
class Words:
    """The words of a text in one buffer: word i is ``buffer[starts[i]:ends[i]]``, one space between two words."""

    buffer: bytes
    starts: npt.NDArray[np.intp]
    ends: npt.NDArray[np.intp]

    @staticmethod
    def of(text: str) -> Words:
        """Lay out the ``normal_words`` of ``text``."""
        simple = simplify(text)
        if not text.isascii():
            simple = " ".join(Page(simple).words)
        buffer = simple.encode()
        spaces = np.flatnonzero(np.frombuffer(buffer, np.uint8) == _SPACE)
        if not buffer:
            return Words(buffer, spaces, spaces)
        return Words(buffer, np.concatenate([[0], spaces + 1]), np.concatenate([spaces, [len(buffer)]]))

    def __len__(self) -> int:
        return self.starts.size

    def ngram_hashes(self, n: int) -> Hashes:
        """xxh64 of every run of ``n`` words joined by spaces; empty for a text of fewer words."""
        count = max(len(self) - n + 1, 0)
        buffer = self.buffer
        spans = zip(self.starts[:count].tolist(), self.ends[n - 1 :].tolist(), strict=True)
        return np.fromiter((xxh64_intdigest(buffer[start:end]) for start, end in spans), np.uint64, count)
