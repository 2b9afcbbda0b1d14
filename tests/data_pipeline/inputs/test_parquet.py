"""Parquet: every column type that holds text, row groups as parts, and bad rows by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.inputs.parquet import row_group_bytes
from data_pipeline.inputs.streams import open_part

Read = Callable[..., Any]
TEXTS = [f"text {number} \u00e9" for number in range(1000)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_text_is_read_from_every_type_of_column(tmp_path: Path, read: Read, kind: Any) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind), "id": range(1000)}), tmp_path / "a.parquet")
    reading = read(tmp_path)
    assert reading.texts == TEXTS
    assert [document.id for document in reading.documents] == [str(number) for number in range(1000)]
    assert [document.metadata["origin"]["position"] for document in reading.documents] == list(range(1000))


def test_a_giant_file_is_cut_between_row_groups_and_rows_keep_their_numbers(tmp_path: Path, read: Read) -> None:
    table = pa.table({"content": TEXTS, "domain": ["web"] * 1000, "other": [b"\0" * 99] * 1000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=90)
    source = {"path": str(tmp_path), "text_key": "content"}
    size = (tmp_path / "a.parquet").stat().st_size
    reading = read(source, piece_bytes=size)
    assert len(reading.pieces) == 4
    assert [piece[0].start for piece in reading.pieces[1:]] == [piece[0].end for piece in reading.pieces[:-1]]
    assert reading.texts == TEXTS
    assert [document.metadata["origin"]["position"] for document in reading.documents] == list(range(1000))
    assert {document.metadata["domain"] for document in reading.documents} == {"web"}
    assert read(source, piece_bytes=1).texts == TEXTS
    with open_part(reading.pieces[0][0]) as stored:
        assert len(row_group_bytes(stored)) == 12


def test_bad_rows_are_put_aside_by_number(tmp_path: Path, read: Read) -> None:
    texts = pa.array([b"fine", b"caf\xe9", b"x" * 2000, None, b"last"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 5, texts.buffers())  # not UTF-8 in a column that says it is
    for name, column in (("bytes", texts), ("strings", broken)):
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.table({"text": column}), folder / "a.parquet")
        reading = read(folder, max_document_bytes=1000)
        assert reading.texts == ["fine", "", "last"]
        assert [(bad["reason"], bad["where"], bad["bytes"]) for bad in reading.bad] == [
            ("invalid_utf8", "a.parquet, row 1", 4),
            ("too_large", "a.parquet, row 2", 2000),
        ]


def test_names_that_are_not_utf8_make_bad_rows_only(tmp_path: Path, read: Read) -> None:
    identities = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": ["a", "b"], "id": identities}), tmp_path / "a.parquet")
    assert set(read(tmp_path).reasons) == {"wrong_type"}


def test_a_file_without_the_column_or_of_another_type_is_named(tmp_path: Path, read: Read) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": ["b"]}), tmp_path / "a.parquet")
    reading = read(tmp_path)
    assert reading.reasons == ["no_text"]
    assert "has no column 'text'; it has: body, id" in reading.bad[0]["problem"]
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert read(tmp_path).reasons == ["wrong_type"] * 2


def test_a_truncated_file_is_damaged(tmp_path: Path, read: Read) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (content[:-9], content[:500], b"", b"PAR1" * 4):
        (tmp_path / "a.parquet").write_bytes(damaged)
        assert read(tmp_path, piece_bytes=1).reasons == ["damaged"]
