"""The normal form is datatrove's, by another way, and its words are those of the filters."""

from __future__ import annotations

import sys

import pytest
from datatrove.utils.text import ngrams, simplify_text
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from data_pipeline.clean.words import FastWords
from data_pipeline.dedup.normal_form import Words, normal_words, simplify, word_spans

# Plain text of any characters, and text crowded with those that the normal form has rules for.
TRICKY = (
    "aB1.,\u0663 \u03a3\u03c3\u0301\u00e9\u00c9\n"
    "\t\x1c\x85'\u2019-!\u20ac\u2000\u037e\ufb010\u00b2\u00bd\u2167\u4e2d\u3042\uff11\u0e01"
)
TEXTS = st.text() | st.text(alphabet=TRICKY) | st.text(alphabet="ab 1,.-'\n")


@given(TEXTS)
def test_simplify_is_datatroves_simplify_text(text: str) -> None:
    assert simplify(text) == simplify_text(text)


def test_simplify_is_datatroves_simplify_text_for_every_character() -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(characters), 97):
        text = "a".join(characters[start : start + 97])
        assert simplify(text) == simplify_text(text)


@given(TEXTS, st.integers(1, 6))
def test_ngram_hashes_are_those_of_the_joined_words(text: str, n: int) -> None:
    words = FastWords().word_tokenize(simplify_text(text))
    assert normal_words(text) == words
    assert len(Words.of(text)) == len(words)
    assert Words.of(text).ngram_hashes(n).tolist() == [xxh64_intdigest(" ".join(run)) for run in ngrams(words, n)]


@given(TEXTS)
def test_word_spans_say_where_each_word_comes_from(text: str) -> None:
    spans, words = word_spans(text), normal_words(text)
    assert len(spans) == len(words)
    assert all(word in normal_words(text[start:stop]) for word, (start, stop) in zip(words, spans, strict=True))
    assert spans == sorted(spans)


@pytest.mark.parametrize("text", ["", " ", "...", "\u0301"])
def test_texts_without_words_have_none(text: str) -> None:
    assert Words.of(text).ngram_hashes(1).size == len(normal_words(text))
