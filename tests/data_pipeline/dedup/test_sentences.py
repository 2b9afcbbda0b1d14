"""Each passage stays once: no sentence of the corpus is lost, and none of its copies is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DedupSettings
from data_pipeline.dedup.sentences import remove_duplicate_sentences, split_sentences
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.tally import read_tallies
from data_pipeline.inputs.readers import InputFile, read_documents, stage_files

WritePieces = Callable[[Path, Sequence[Sequence[str]]], list[InputFile]]


def texts_of(folder: Path) -> list[str]:
    return [doc.text for file in stage_files(folder / "documents") for doc in read_documents(file)]


def text_with(letters: str) -> str:
    """One sentence of five words a letter."""
    return " ".join(" ".join(f"{letter}{word}" for word in "abcde") + "." for letter in letters)


def run(folder: Path, write_pieces: WritePieces, pieces: Sequence[Sequence[str]], **values: int) -> list[str]:
    files = write_pieces(folder / "in", pieces)
    keys = DedupSettings(sentences=True, **{"min_words_left": 0, "min_span_words": 1, **values})
    remove_duplicate_sentences(LocalExecutor(1), files, folder / "out", keys, range_bytes=64)
    return texts_of(folder / "out")


@given(st.text(alphabet="ab. \n!?\u2028"))
def test_sentences_joined_are_the_text(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)


def test_the_first_of_equal_passages_stays(tmp_path: Path, write_pieces: WritePieces) -> None:
    pieces = [[text_with("vwxyz")], [], [text_with("awxyb"), text_with("wx")], [text_with("xyz")]]
    assert run(tmp_path, write_pieces, pieces) == [text_with("vwxyz"), text_with("ab"), text_with("wx")]
    tally = read_tallies(tmp_path / "out" / "tallies" / "dropped")
    assert tally == {"duplicate_sentences\tprose\t": {"documents": 1, "bytes": len(text_with("xyz"))}}
    cut = read_tallies(tmp_path / "out" / "tallies" / "dropped_cut")
    assert cut == {
        "duplicate_sentences_cut\tprose\t": {"documents": 0, "bytes": len(text_with("awxyb")) - len(text_with("ab"))}
    }


@pytest.mark.parametrize(("before", "after"), [("aaaaaa", "aaa"), ("abcxabc", "abcx"), ("ababab", "aba"), ("aa", "aa")])
def test_a_passage_that_overlaps_itself_keeps_its_first_occurrence(
    tmp_path: Path, write_pieces: WritePieces, before: str, after: str
) -> None:
    assert run(tmp_path, write_pieces, [[text_with(before)]]) == [text_with(after)]


def test_short_passages_and_those_that_differ_stay(tmp_path: Path, write_pieces: WritePieces) -> None:
    pieces = [[text_with("abc"), text_with("abc"), text_with("abd"), "Yes. No. Yes.", "Yes. No. Yes."]]
    left = run(tmp_path, write_pieces, pieces, min_span_words=15)
    assert left == [text_with("abc"), text_with("abd"), "Yes. No. Yes.", "Yes. No. Yes."]


def test_a_document_of_which_too_little_is_left_goes(tmp_path: Path, write_pieces: WritePieces) -> None:
    pieces = [[text_with("abc"), text_with("abcx"), text_with("abcxyz")]]
    assert run(tmp_path, write_pieces, pieces, min_words_left=6) == [text_with("abc"), text_with("yz")]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(st.text("abcd", max_size=12), max_size=3), min_size=1, max_size=3))
def test_no_sentence_is_lost(
    tmp_path_factory: pytest.TempPathFactory, write_pieces: WritePieces, pieces: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("sentences")
    before = [[text_with(letters) for letters in piece] for piece in pieces]
    after = run(folder, write_pieces, before)
    assert {s.strip() for text in after for s in split_sentences(text)} == {
        s.strip() for piece in before for text in piece for s in split_sentences(text)
    }
    assert sum(map(len, after)) <= sum(len(text) for piece in before for text in piece)
