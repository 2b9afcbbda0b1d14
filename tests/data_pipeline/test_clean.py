"""Cleaning mends text without rewriting it, and each rule drops under its own name."""

from __future__ import annotations

from pathlib import Path

import pytest
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clean.pipeline import LengthFilter, NormaliseText, clean_pipeline
from data_pipeline.clean.words import FastWords
from data_pipeline.config import CleanSettings, QualitySettings
from data_pipeline.execution.tally import DroppedWriter, read_tallies
from data_pipeline.inputs.readers import InputFile, stage_files
from data_pipeline.inputs.readers import read_documents as read

NORMALISE = NormaliseText(CleanSettings())


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
    ],
)
def test_text_is_mended_and_otherwise_kept(dirty: str, clean: str) -> None:
    assert NORMALISE.format(dirty) == clean


@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\r\t\u00a0\u00ad\u0301e\u2028"))))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    normalise = NormaliseText(CleanSettings(fix_encoding=False))
    once = normalise.format(text)
    assert normalise.format(once) == once


def test_spaces_inside_lines_are_kept_when_asked() -> None:
    assert NormaliseText(CleanSettings(collapse_spaces=False)).format("a   b") == "a   b"


@pytest.mark.parametrize(
    ("length", "result"), [(0, (False, "empty")), (9, (False, "too_short")), (10, True), (21, (False, "too_long"))]
)
def test_length_limits_are_inclusive_and_named(tmp_path: Path, length: int, result: object) -> None:
    settings = QualitySettings(min_characters=10, max_characters=20)
    length_filter = LengthFilter(settings, DroppedWriter(tmp_path / "d", tmp_path / "t"))
    assert length_filter.filter(Document(text="x" * length, id="1")) == result


def test_every_document_is_kept_or_dropped_under_a_name(small_corpus: Path, tmp_path: Path) -> None:
    files = [InputFile(path) for path in sorted(small_corpus.iterdir())]
    for rank in range(len(files)):
        data = None
        for step in clean_pipeline(files, CleanSettings(), QualitySettings(), tmp_path):
            data = step(data, rank, len(files))
        assert data is not None
        list(data)
    read_counts, kept = (read_tallies(tmp_path / "tallies" / name) for name in ("read", "kept"))
    dropped = read_tallies(tmp_path / "tallies" / "dropped_length")
    assert dropped == {
        "too_short\tprose": {"documents": 1, "bytes": len("Too short.")},
        "empty\tprose": {"documents": 1, "bytes": 0},
    }
    assert read_counts["prose"]["documents"] == kept["prose"]["documents"] + 2
    assert read_counts["technical"] == kept["technical"]
    written = [document for file in stage_files(tmp_path / "documents") for document in read(file)]
    assert len(written) == sum(counts["documents"] for counts in kept.values()) == 202


def test_words_are_letters_with_inner_marks_and_single_punctuation() -> None:
    words = FastWords().word_tokenize("Don't stop: well-known x_1 caf\u00e9 (no).")
    assert words == ["Don't", "stop", ":", "well-known", "x_1", "caf\u00e9", "(", "no", ")", "."]


def test_sentence_spans_point_at_their_sentences() -> None:
    text = "One here. Two there! Three?"
    words = FastWords()
    assert [text[start:end] for start, end in words.span_tokenize(text)] == words.sent_tokenize(text)
