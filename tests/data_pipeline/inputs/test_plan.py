"""The work plan: even pieces, every byte in one of them, whatever the sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import InputSettings, SourceSettings
from data_pipeline.inputs import plan
from data_pipeline.inputs.file_tables import FileTable, SourceFile, find_files
from data_pipeline.inputs.plan import plan_pieces, read_piece, write_file_tables, write_pieces


def table_of(sizes: list[int], suffix: str) -> FileTable:
    files = [SourceFile(f"{n:03d}.{suffix}", f"/x/{n:03d}", "jsonl", size, "d") for n, size in enumerate(sizes)]
    return FileTable(SourceSettings(path="/x"), "x", tuple(files), {})


SIZES = st.lists(st.integers(0, 5000), min_size=1, max_size=30)
# Below 36 bytes the 1.8 MB that three sources may have would be more than MOST_PIECES pieces, which makes them larger.
TARGETS = st.integers(36, 4000)


@given(st.lists(st.tuples(SIZES, st.sampled_from(["jsonl", "jsonl.gz"])), min_size=1, max_size=3), TARGETS)
def test_pieces_cover_every_byte_of_every_file_once_in_order(shapes: list[tuple[list[int], str]], target: int) -> None:
    tables = [table_of(sizes, suffix) for sizes, suffix in shapes]
    pieces = plan_pieces(tables, InputSettings(piece_bytes=target))
    assert all(pieces)
    parts = [part for piece in pieces for part in piece]
    place = (0, 0, 0)
    for part in parts:
        assert (part.source, part.file, part.start) == place
        last = part.file + 1 == len(tables[part.source].files)
        after = (part.source + 1, 0, 0) if last else (part.source, part.file + 1, 0)
        place = after if part.end is None else (part.source, part.file, part.end)
    assert place == (len(tables), 0, 0)
    for piece in pieces[:-1]:
        packed = piece[0].compression is not None
        sizes = [(part.stored_bytes if part.end is None else part.end) - part.start for part in piece]
        if len(piece) == 1 and not packed:
            assert piece[0].stored_bytes < target or sizes[0] < 2 * target + 1
        if len(piece) > 1:
            assert sum(
                max(size, 1) * (4 if part.compression else 1) for size, part in zip(sizes, piece, strict=True)
            ) < (2 * target)


def test_a_giant_corpus_has_larger_pieces_rather_than_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MOST_PIECES", 10)
    pieces = plan_pieces([table_of([1000] * 100, "jsonl")], InputSettings(piece_bytes=1))
    assert [len(piece) for piece in pieces] == [10] * 10
    assert len(plan_pieces([table_of([100_000], "jsonl")], InputSettings(piece_bytes=1))) == 10


def test_a_written_plan_is_read_piece_by_piece(tmp_path: Path) -> None:
    pieces = plan_pieces([table_of([10, 10_000, 3, 4], "jsonl")], InputSettings(piece_bytes=2000))
    assert [len(piece) for piece in pieces] == [1, 1, 1, 1, 1, 1, 2]
    write_pieces(pieces, tmp_path / "deep" / "plan.jsonl")
    assert [read_piece(tmp_path / "deep" / "plan.jsonl", number) for number in range(7)] == pieces
    with pytest.raises(IndexError):
        read_piece(tmp_path / "deep" / "plan.jsonl", 7)


def test_the_tables_say_which_file_an_origin_means(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.png"):
        (tmp_path / name).write_text(name)
    sources = [SourceSettings(path=str(tmp_path), name="one"), SourceSettings(path=str(tmp_path / "b.txt"))]
    write_file_tables(find_files(sources, InputSettings()), tmp_path / "files.json")
    first, second = json.loads((tmp_path / "files.json").read_text())
    assert (first["source"], first["files"], first["bytes"]) == ("one", ["a.txt", "b.txt"], [5, 5])
    assert first["left_out"] == {"*.png": 1}
    assert (second["source"], second["files"]) == ("b.txt", ["b.txt"])
    assert first["digests"][1] == second["digests"][0]
