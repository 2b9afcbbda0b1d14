"""JSON lines: records, names and origins; ranges of bytes share the records of a file exactly."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.inputs.jsonl import read_jsonl
from data_pipeline.inputs.parts import BadRecord, Part
from data_pipeline.inputs.streams import open_part

Read = Callable[..., Any]


def part_of(path: Path, start: int = 0, end: int | None = None) -> Part:
    return Part(0, 0, "file", str(path), path.name, "jsonl", None, path.stat().st_size, start, end)


def read_part(part: Part) -> list[Document | BadRecord]:
    with open_part(part) as stored:
        return [found for found in read_jsonl(part, stored, 40) if found is not None]


LINES = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}).encode(), st.text(max_size=8)),
    st.sampled_from([b"", b" ", b"\r", b'{"text": ', b"\xff", b"x" * 60, b" " * 60, b'{"text": "a"}\r']),
)


@settings(max_examples=150)
@example(content=b'{"text": ""}\n' * 3 + b" " * 60 + b"\n", cuts=[27])  # blank lines are none, however long
@given(content=st.lists(LINES, max_size=12).map(b"\n".join), cuts=st.lists(st.integers(0, 300), max_size=6))
def test_ranges_cut_anywhere_give_each_record_of_the_file_once(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    path.write_bytes(content)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(content)), None]
    ranges = [part_of(path, start or 0, end) for start, end in itertools.pairwise(bounds)]
    together = [found for part in ranges if part.end != part.start for found in read_part(part)]
    assert together == read_part(part_of(path))
    positions = [r.position if isinstance(r, BadRecord) else r.metadata["origin"]["position"] for r in together]
    assert positions == sorted(set(positions))


def test_the_position_is_where_the_record_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa9"}\r\n\n  \n{"text": "b"}\n {"text": "c"}')
    content = path.read_bytes()
    found = read_part(part_of(path))
    assert [document.text for document in found if isinstance(document, Document)] == ["\u00e9", "b", "c"]
    positions = [document.metadata["origin"]["position"] for document in found if isinstance(document, Document)]
    assert positions == [0, content.index(b'{"text": "b"'), content.index(b' {"text": "c"')]


@pytest.mark.parametrize(
    ("line", "reason", "problem"),
    [
        (b'{"text": ', "not_json", "is not JSON (unexpected end of data"),
        (b"[1]", "not_an_object", "is not an object with a 'text'"),
        (b'{"text": 5}', "wrong_type", "'text' is not a string"),
        (b'{"text": "a", "metadata": {"domain": 3}}', "wrong_type", "the domain is not a short string"),
        (b'{"text": "a", "source": "tab\\tbed"}', "wrong_type", "the source is not a short string"),
        (b'{"text": "a", "id": {}}', "wrong_type", "'id' is neither a string nor a number"),
        (b'{"text": "\\ud800"}', "not_json", "surrogate"),
        (b'{"text": "caf\xe9"}', "invalid_utf8", "is not UTF-8"),
        (b'{"txt": "a", "title": "b"}', "no_text", "has no 'text'; it has: title, txt"),
        (b"[" * 5000, "not_json", "is not JSON"),
        (b"x" * 10_001, "too_large", "is larger than inputs.max_document_bytes = 10000"),
    ],
)
def test_a_bad_record_is_put_aside_with_its_place_and_the_rest_is_read(
    tmp_path: Path, read: Read, line: bytes, reason: str, problem: str
) -> None:
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "too"}\n')
    reading = read(path.parent, max_document_bytes=10_000)
    assert reading.texts == ["fine", "too"]
    (bad,) = reading.bad
    assert (bad["reason"], bad["where"], bad["bytes"]) == (reason, "a.jsonl, byte 17", len(line))
    assert problem in bad["problem"]
    assert bad["excerpt"]
    reading.check()


def test_names_come_from_metadata_then_the_record_then_the_source(tmp_path: Path, read: Read) -> None:
    folder = tmp_path / "My dumps"
    folder.mkdir()
    records = [
        {"text": "x", "metadata": {"domain": "one", "source": "s1"}, "domain": "two", "id": 7},
        {"text": "x", "domain": "two", "source": "s2", "id": "b", "metadata": "ignored"},
        {"text": None, "metadata": {"domain": ""}},
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    reading = read({"path": str(folder), "domain": "three"})
    assert [document.metadata["domain"] for document in reading.documents] == ["one", "two", "three"]
    assert [document.metadata["source"] for document in reading.documents] == ["s1", "s2", "My-dumps"]
    position = reading.documents[2].metadata["origin"]["position"]
    assert [document.id for document in reading.documents] == ["7", "b", f"a.jsonl/{position}"]
    assert reading.texts == ["x", "x", ""]


def test_records_with_the_same_id_stay_and_their_origins_tell_them_apart(tmp_path: Path, read: Read) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "1", "text": "a"}\n{"id": "1", "text": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"id": "1", "text": "c"}\n')
    reading = read(tmp_path)
    assert [(document.id, document.text) for document in reading.documents] == [("1", "a"), ("1", "b"), ("1", "c")]
    assert [tuple(document.metadata["origin"].values()) for document in reading.documents] == [
        (0, 0, 0),
        (0, 0, 25),
        (0, 1, 0),
    ]
