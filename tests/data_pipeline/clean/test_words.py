"""Words are found by array operations; here one character after the other, as the module's docstring says it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean.words import FastWords, Page, split_into_sentences

texts = st.text(
    alphabet=st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from("ab1_ \n'-\u2019.,\u0301\u200d\u4e2d\u3042\u30a2\u0939\u093f\U00020000\U0001f468\x1c"),
    ),
    max_size=60,
)


def words_one_by_one(text: str) -> list[str]:
    def single(c: str) -> bool:
        name = unicodedata.name(c, "")
        return name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH")) or "\u3041" <= c <= "\u3096"

    def in_word(c: str) -> bool:
        return (c.isalnum() or c == "_" or unicodedata.category(c).startswith("M")) and not single(c)

    words, run = [], ""
    for index, c in enumerate(text):
        inner = c in "'\u2019-\u200c\u200d" and 0 < index < len(text) - 1
        if in_word(c) or (inner and in_word(text[index - 1]) and in_word(text[index + 1])):
            run += c
            continue
        words += [run] if run else []
        words += [] if c.isspace() else [c]
        run = ""
    return words + ([run] if run else [])


@settings(max_examples=300, deadline=None)
@given(texts)
def test_words_are_those_found_one_by_one(text: str) -> None:
    page = Page(text)
    assert page.words == words_one_by_one(text)
    assert [text[s:e] for s, e in zip(page.starts, page.ends, strict=True)] == page.words
    assert page.n_words == len(page.words)


@given(st.text(alphabet=st.characters(codec="ascii"), max_size=80))
def test_ascii_has_a_faster_way_to_the_same_words(text: str) -> None:
    page = Page(text)
    assert page.words == [text[s:e] for s, e in zip(page.starts, page.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop: well-known x_1 (no).", ["Don't", "stop", ":", "well-known", "x_1", "(", "no", ")", "."]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092e\u0947\u0902"],
        ),
        ("\u4e2d\u6587 \u30ab\u30bf\u30ab\u30ca\u3067", ["\u4e2d", "\u6587", "\u30ab\u30bf\u30ab\u30ca", "\u3067"]),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"]),
        ("- a -b c- 'd'", ["-", "a", "-", "b", "c", "-", "'", "d", "'"]),
    ],
)
def test_words_of_several_scripts(text: str, words: list[str]) -> None:
    assert FastWords().word_tokenize(text) == words


def test_sentence_spans_point_at_their_sentences() -> None:
    text = "One here. Two there! Three?"
    assert [text[start:end] for start, end in FastWords().span_tokenize(text)] == split_into_sentences(text)
    assert len(split_into_sentences(text)) == 3
