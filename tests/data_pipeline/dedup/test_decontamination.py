"""What an evaluation set asks is found in the corpus, always; the rest is left alone; the report lists both."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataSettings, DecontaminationSettings, EvaluationSetSettings
from data_pipeline.dedup.decontamination import MATCHES, decontaminate, read_summary, without_matches
from data_pipeline.dedup.evaluation_sets import EvaluationTable, build_table, check_evaluation_sets
from data_pipeline.dedup.normal_form import Words, normal_words
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.tally import read_tallies
from data_pipeline.inputs.readers import InputFile, read_documents, stage_files
from launch.settings import BadInputError, parse_settings

TextOf = Callable[[int], str]
WritePieces = Callable[[Path, Sequence[Sequence[str]]], list[InputFile]]
Kept = Callable[[Path], list[str]]


def evaluation_set(path: Path, items: Sequence[dict[str, Any]], name: str = "quiz") -> EvaluationSetSettings:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return EvaluationSetSettings(name=name, path=str(path), fields=tuple(items[0]))


def words(text: str, start: int, stop: int) -> str:
    return " ".join(text.split()[start:stop])


@pytest.fixture
def two_sets(tmp_path: Path, text_of: TextOf) -> tuple[EvaluationSetSettings, ...]:
    """Long and short items: a question of 30 words, one of 10, an answer of 3, choices, and an item of no use."""
    quiz = [
        {"question": words(text_of(100), 0, 30), "answer": "of three words"},
        {"question": words(text_of(101), 0, 10), "answer": None},
        {"question": "too short", "answer": 4},
    ]
    other = [{"choices": [words(text_of(102), 0, 9), words(text_of(102), 50, 59)]}]
    return (
        evaluation_set(tmp_path / "quiz.jsonl", quiz),
        evaluation_set(tmp_path / "other.jsonl", other, "other"),
    )


def make_corpus(text_of: TextOf) -> list[list[str]]:
    quiz, short, choices = text_of(100), text_of(101), text_of(102)
    return [
        [text_of(1), f"{words(text_of(2), 0, 60)}\n“{words(quiz, 5, 18).upper()}”! {words(text_of(2), 60, 200)}"],
        [],
        [f"{words(text_of(3), 0, 50)} {words(quiz, 5, 17)} {words(text_of(3), 50, 90)}"],  # 12 words: one too few
        [f"{words(text_of(4), 0, 50)} {words(short, 0, 10)} {words(text_of(4), 50, 90)}"],
        [words(choices, 0, 9) + " " + words(choices, 50, 59) + " " + words(quiz, 20, 30) + " of three words"],
    ]


def test_documents_that_contain_an_item_are_dropped_and_listed(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces, kept: Kept, two_sets: tuple[EvaluationSetSettings, ...]
) -> None:
    files = write_pieces(tmp_path / "in", make_corpus(text_of))
    decontaminate(LocalExecutor(1), files, tmp_path / "out", DecontaminationSettings(sets=two_sets))
    assert kept(tmp_path / "out") == ["0/0", "2/0"]
    tally = read_tallies(tmp_path / "out" / "tallies" / "dropped")
    assert {key: counts["documents"] for key, counts in tally.items()} == {"contaminated_quiz\tprose\t": 3}
    assert read_summary(tmp_path / "out") == {
        "quiz": {"items": 3, "items_too_short": 1, "items_found": 2, "documents_dropped": 3, "documents_cut": 0},
        "other": {"items": 1, "items_too_short": 0, "items_found": 1, "documents_dropped": 1, "documents_cut": 0},
    }
    matches = [
        json.loads(line)
        for path in sorted((tmp_path / "out" / MATCHES).iterdir())
        for line in path.read_text().splitlines()
    ]
    assert [(match["id"], match["items"]) for match in matches] == [
        ("0/1", {"quiz": [0]}),
        ("3/0", {"quiz": [1]}),
        ("4/0", {"quiz": [0], "other": [0]}),
    ]
    assert matches[0]["words"] == words(text_of(100), 5, 18)


def test_matching_passages_are_cut_and_nothing_else(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces, kept: Kept, two_sets: tuple[EvaluationSetSettings, ...]
) -> None:
    corpus = make_corpus(text_of)
    files = write_pieces(tmp_path / "in", corpus)
    decontaminate(LocalExecutor(1), files, tmp_path / "out", DecontaminationSettings(sets=two_sets, action="cut"))
    documents = [doc for file in stage_files(tmp_path / "out" / "documents") for doc in read_documents(file)]
    assert [doc.id for doc in documents] == ["0/0", "0/1", "2/0", "3/0"]
    assert documents[1].text == f"{words(text_of(2), 0, 60)}\n\n{words(text_of(2), 60, 200)}"
    assert documents[3].text == f"{words(text_of(4), 0, 50)}\n\n{words(text_of(4), 50, 90)}"
    before = sum(len(text.encode()) for piece in corpus for text in piece)
    after = sum(len(doc.text.encode()) for doc in documents)
    tallies = [read_tallies(tmp_path / "out" / "tallies" / name) for name in ("dropped", "dropped_cut")]
    assert before - after == sum(counts["bytes"] for tally in tallies for counts in tally.values())
    summary = read_summary(tmp_path / "out")["quiz"]
    assert (summary["documents_cut"], summary["documents_dropped"]) == (2, 1)


LETTERS = st.lists(st.sampled_from("abcde"), max_size=25)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(LETTERS, LETTERS), min_size=1, max_size=4), LETTERS, st.integers(1, 5), st.integers(1, 5))
def test_hits_are_exactly_the_common_ngrams_and_cutting_leaves_none(
    tmp_path_factory: pytest.TempPathFactory,
    items: list[tuple[list[str], list[str]]],
    document: list[str],
    ngram: int,
    min_words: int,
) -> None:
    folder = tmp_path_factory.mktemp("table")
    rows = [{"q": " ".join(q), "a": "  ".join(a)} for q, a in items]
    keys = DecontaminationSettings(
        sets=(evaluation_set(folder / "set.jsonl", rows),), ngram=ngram, min_words=min(ngram, min_words)
    )
    build_table(keys, folder / "table")
    table = EvaluationTable(folder / "table")
    wanted: dict[tuple[str, ...], set[int]] = {}
    for number, (q, a) in enumerate(items):
        for text in (q, a, q + a):
            length = min(len(text), ngram)
            if length >= keys.min_words:
                for start in range(len(text) - length + 1):
                    wanted.setdefault(tuple(text[start : start + length]), set()).add(number)
    expected = {
        (start, len(gram)): wanted[gram]
        for start in range(len(document))
        for stop in range(start + 1, len(document) + 1)
        if (gram := tuple(document[start:stop])) in wanted
    }
    hits = table.hits(Words.of(" ".join(document)))
    assert {(hit.start, hit.length): {item for _, item in table.items_of(hit)} for hit in hits} == expected
    left = without_matches(", ".join(document), table)
    assert not table.hits(Words.of(left))
    assert bool(hits) == (normal_words(left) != document)


def test_a_match_that_arises_where_another_was_cut_is_cut_too(tmp_path: Path) -> None:
    entry = evaluation_set(tmp_path / "set.jsonl", [{"text": "x y z"}, {"text": "a b c"}])
    build_table(DecontaminationSettings(sets=(entry,), ngram=3, min_words=3), tmp_path / "table")
    assert without_matches("One a b x y z c two", EvaluationTable(tmp_path / "table")) == "One\n\ntwo"


def test_no_contaminated_document_is_missed_among_many(tmp_path: Path, text_of: TextOf) -> None:
    generator = random.Random(0)
    items = [{"text": words(text_of(seed), 0, 40)} for seed in range(300)]
    keys = DecontaminationSettings(sets=(evaluation_set(tmp_path / "set.jsonl", items),))
    build_table(keys, tmp_path / "table")
    table = EvaluationTable(tmp_path / "table")
    for item in range(300):
        start = generator.randrange(28)
        passage = words(text_of(item), start, start + 13)
        assert any(table.items_of(hit) == [(0, item)] for hit in table.hits(Words.of(f"{text_of(999)} {passage}")))
    assert not table.hits(Words.of(" ".join(text_of(seed) for seed in range(1000, 1100))))


def test_workers_change_nothing(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces, two_sets: tuple[EvaluationSetSettings, ...]
) -> None:
    files = write_pieces(tmp_path / "in", make_corpus(text_of))
    keys = DecontaminationSettings(sets=two_sets, action="cut")
    results = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        decontaminate(LocalExecutor(workers), files, folder, keys)
        paths = [path for name in ("documents", "dropped", "tallies") for path in (folder / name).rglob("*")]
        results.append({str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()})
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"decontamination\.sets\.0\.path = .*: has no item"),
        ('{"q": "x"}\n{"q"', "item 2: not JSON"),
        ("[1]\n", "item 1: not an object with fields"),
        ('{"question": "x", "id": 1}\n', r"item 1: has no field 'q' \(it has id, question\)"),
        ('{"q": {"text": "x"}}\n', "item 1: 'q' is not a text, a number or a list of such"),
    ],
)
def test_an_evaluation_set_that_is_not_as_described_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(content)
    entry = EvaluationSetSettings(name="quiz", path=str(path), fields=("q",))
    with pytest.raises(BadInputError, match=message):
        check_evaluation_sets(DecontaminationSettings(sets=(entry,)))
    missing = entry.model_copy(update={"path": str(tmp_path / "none.jsonl")})
    with pytest.raises(BadInputError, match=r"sets\.0\.path = .*none\.jsonl.*: cannot be read \(No such file"):
        check_evaluation_sets(DecontaminationSettings(sets=(missing,)))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"ngram": 5}, r"decontamination\.min_words = 8: is more than ngram = 5"),
        ({"sets": [{"name": "a", "path": "x", "fields": ["q"]}] * 2}, r"decontamination\.sets = \"a\": two"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(section: dict[str, Any], message: str) -> None:
    values = {"name": "x", "output": "x", "sources": [{"path": "x"}], "decontamination": section}
    with pytest.raises(BadInputError, match=message):
        parse_settings(DataSettings, values, "file")
