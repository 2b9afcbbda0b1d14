"""Text is mended without rewriting it, and every short cut gives what doing all steps gives."""

from __future__ import annotations

import time
import unicodedata

import ftfy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean import normalise as steps
from data_pipeline.clean.normalise import normalise
from data_pipeline.clean.settings import NormaliseSettings

PROSE = NormaliseSettings()
CODE = NormaliseSettings(fix_encoding=False, unicode_form=None, collapse_spaces=False)
odd_texts = st.text(
    alphabet=st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(" \n\r\t\u00a0\u00ad\u0301e\u2028\x1b[\x00\x85\u2019\u00c3\u00a9\u00e2\u20ac\u2122\u200b"),
    ),
    max_size=60,
)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
        ("a \t\nb", "a\nb"),
        ("one.  Two", "one. Two"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("  \n indented\n   verse \n", "indented\n   verse"),
        ("e\u0301", "\u00e9"),
        ("e\u00ad\u0301", "\u00e9"),
        ("a\u00a0b\u3000c", "a b c"),
        ("\ufeffx\u200by\x00z", "xyz"),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("\u201cquoted\u201d &amp; kept", "\u201cquoted\u201d &amp; kept"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("red \x1b[31mtext\x1b[0m", "red text"),
    ],
)
def test_text_is_mended_and_otherwise_kept(dirty: str, clean: str) -> None:
    assert normalise(dirty, PROSE) == clean


def test_code_keeps_its_layout() -> None:
    code = "\n\n    def f(x):\n\treturn  {'a':  1}   # two\n\n\n\n\nclass A: \n"
    assert normalise(code, CODE) == "    def f(x):\n\treturn  {'a':  1}   # two\n\nclass A:"


@settings(max_examples=300, deadline=None)
@given(odd_texts)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    for values in (PROSE.model_copy(update={"fix_encoding": False}), CODE):
        once = normalise(text, values)
        assert normalise(once, values) == once


@settings(max_examples=300, deadline=None)
@given(odd_texts)
def test_short_cuts_give_what_all_steps_give(text: str) -> None:
    full = ftfy.fix_text(
        text.replace("\x0b", "\n"),
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        normalization=None,
    )
    full = steps._INVISIBLE.sub("", steps._LINE_ENDS.sub("\n", full))
    full = steps._ODD_SPACES.sub(" ", unicodedata.normalize("NFC", full))
    full = steps._INNER_SPACES.sub(" ", steps._TRAILING_SPACE.sub("", full))
    assert normalise(text, PROSE) == steps._BLANK_LINES.sub("\n\n", full).strip()


def test_time_is_linear_in_a_run_of_spaces_or_newlines() -> None:
    start = time.process_time()
    assert normalise("a" + " " * 300_000 + "b" + "\n" * 300_000 + "c" + "\t" * 300_000 + "d", CODE)
    assert time.process_time() - start < 2
