"""A document split into words once, for all filters: positions in arrays first, strings only for who asks.

**Words.** A word is a run of letters, digits, underscores and combining marks, with single apostrophes and hyphens
inside; Han and Hiragana characters are a word each; every other visible character is a word of its own, as the Gopher
rules expect of punctuation. Nearly all decisions of the filters agree with those on spaCy's words, whose blank splitter
takes most of the time of datatrove's quality filters and MinHash.

**Cost.** The positions are found by array operations, at about 50 MB/s a core; a list of strings costs three times
that.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from datatrove.utils.word_tokenizers import WordTokenizer
from numpy.typing import NDArray

from data_pipeline.clean.characters import JOINER, SPACE, WORD, class_bits, code_points

_ASCII_WORD = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Page:
    """One text and what the filters ask about it, each worked out when first asked for and kept.

    Positions count characters. ``starts`` and ``ends`` are int64 (n_words,); ``bits`` is uint8 (characters,), see
    characters.py.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def codes(self) -> NDArray[np.uint8] | NDArray[np.uint32]:
        """The characters as numbers."""
        return code_points(self.text)

    @functools.cached_property
    def bits(self) -> NDArray[np.uint8]:
        """What each character is."""
        return class_bits(self.codes)

    @functools.cached_property
    def _spans(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        bits = self.bits
        inside = (bits & WORD).view(bool)
        joins = (bits[1:-1] & JOINER).astype(bool)
        joins &= inside[:-2]
        joins &= inside[2:]
        if joins.any():
            inside[1:-1] |= joins
        alone = ~inside
        alone &= (bits & SPACE) == 0
        # A run starts where the character before is not of a run, and ends where the one after is not.
        first, last = alone.copy(), alone
        if inside.size:
            first[0] |= inside[0]
            last[-1] |= inside[-1]
            change = inside[1:] != inside[:-1]
            first[1:] |= change & inside[1:]
            last[:-1] |= change & inside[:-1]
        return np.flatnonzero(first), np.flatnonzero(last) + 1

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each word begins."""
        return self._spans[0]

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each word ends (the position after its last character)."""
        return self._spans[1]

    @property
    def n_words(self) -> int:
        """How many words there are."""
        return int(self.starts.size)

    @functools.cached_property
    def words(self) -> list[str]:
        """The words as strings."""
        if self.text.isascii():
            return _ASCII_WORD.findall(self.text)
        text = self.text
        return [text[start:end] for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True)]

    @functools.cached_property
    def lines(self) -> list[str]:
        """The lines with something on them."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]


def split_into_sentences(text: str) -> list[str]:
    """The sentences of ``text``, cut after full stops, question and exclamation marks."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence and not sentence.isspace()]


class FastWords(WordTokenizer):
    """The same words and sentences for datatrove's blocks, in place of spaCy's; keeps the last text's words."""

    def __init__(self) -> None:
        super().__init__("en")
        self._last = Page("")

    def word_tokenize(self, text: str) -> list[str]:
        """The words and punctuation marks of ``text``, in order; callers must not change the list."""
        if text is not self._last.text:
            self._last = Page(text)
        return self._last.words

    def sent_tokenize(self, text: str) -> list[str]:
        """See :func:`split_into_sentences`."""
        return split_into_sentences(text)

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The (start, end) positions of the sentences of ``text``."""
        spans, start = [], 0
        for sentence in self.sent_tokenize(text):
            start = text.index(sentence, start)
            spans.append((start, start + len(sentence)))
            start += len(sentence)
        return spans
