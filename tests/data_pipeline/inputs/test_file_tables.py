"""File tables: sorted, complete, safe on odd trees, and every mistake of a user is one line."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash

from data_pipeline.config import InputSettings, SourceSettings
from data_pipeline.inputs import file_tables
from data_pipeline.inputs.file_tables import FileTable, describe_files, find_files
from launch.settings import BadInputError

Read = Callable[..., Any]
LINE = b'{"text": "a"}\n'


def find(path: Path | str, **source: Any) -> FileTable:
    return find_files([SourceSettings(path=str(path), **source)], InputSettings())[0]


def names(table: FileTable) -> list[str]:
    return [file.name for file in table.files]


def test_files_are_sorted_by_name_and_hashed_by_content(tmp_path: Path) -> None:
    wanted = ["B.jsonl", "a.jsonl", "a/b.jsonl", "a0.jsonl", "c/d/e.jsonl.gz", "\u00e9.jsonl"]
    for name in random.Random(1).sample(wanted, len(wanted)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    table = find(tmp_path)
    assert names(table) == wanted
    digests = [f"xxh3_128:{xxhash.xxh3_128_hexdigest(name.encode())}" for name in wanted]
    assert [file.digest for file in table.files] == digests
    assert [file.stored_bytes for file in table.files] == [len(name.encode()) for name in wanted]


def test_a_listing_digest_changes_with_size_and_time_and_reads_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)
    settings = InputSettings(digest="listing")
    monkeypatch.setattr(file_tables, "open_part", None)
    digests = []
    for time in (1, 1, 2):
        os.utime(path, (time, time))
        digests.append(find_files([SourceSettings(path=str(tmp_path))], settings)[0].files[0].digest)
    assert digests[0] == digests[1] != digests[2]


def test_patterns_and_formats_choose_files_and_the_rest_is_counted(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.txt", "x/c.jsonl", "x/d.parquet", "x/e.png", "x/Makefile", "log.1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINE)
    assert names(find(tmp_path)) == ["a.jsonl", "b.txt", "x/c.jsonl", "x/d.parquet"]
    assert find(tmp_path).left_out == {"*.1": 1, "*.png": 1, "*Makefile": 1}
    assert names(find(tmp_path, pattern="*.jsonl")) == ["a.jsonl"]
    assert names(find(tmp_path, pattern="**/*.jsonl")) == ["a.jsonl", "x/c.jsonl"]
    assert names(find(tmp_path, format="text")) == ["b.txt"]
    assert [file.format for file in find(tmp_path, pattern="log.*", format="jsonl").files] == ["jsonl"]
    assert names(find(tmp_path / "a.jsonl")) == ["a.jsonl"]
    (line,) = describe_files([find(tmp_path)])
    assert line.endswith("4 files, 0.00 MB; left out: 1 *.1, 1 *.png, 1 *Makefile")
    with pytest.raises(BadInputError, match=r"sources\.0\.format = 'auto': cannot tell the format of log\.1"):
        find(tmp_path, pattern="log.*")


def test_links_are_followed_only_when_asked_for_and_circles_end(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "far.jsonl").write_bytes(LINE)
    (folder / "near.jsonl").write_bytes(LINE)
    (folder / "sub" / "circle").symlink_to(folder)
    (folder / "sub" / "self").symlink_to("self")
    (folder / "out").symlink_to(outside)
    (folder / "again").symlink_to(outside)
    (folder / "broken.jsonl").symlink_to("nowhere")
    table = find(folder)
    assert (names(table), table.left_out) == (["near.jsonl"], {"links": 5})
    table = find(folder, follow_links=True)
    assert names(table) == ["again/far.jsonl", "near.jsonl"]
    assert table.left_out == {"broken links": 2}
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.jsonl").symlink_to(outside / "far.jsonl")
    with pytest.raises(BadInputError, match=r"no file to read in .*\(found: 1 links\)"):
        find(tmp_path / "only")


def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_bytes(LINE)
    assert find(tmp_path).left_out == {"devices and pipes": 1}


def test_what_cannot_be_found_or_listed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match=r"sources\.0\.path = '.*/no': no such folder; give the folder"):
        find(tmp_path / "no")
    with pytest.raises(BadInputError, match=r"sources\.0: no file to read in .*\(found: nothing\)"):
        find(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(LINE)
    with pytest.raises(BadInputError, match=r"sources\.0\.pattern = '\*\.zst': matches no file"):
        find(tmp_path, pattern="*.zst")
    with pytest.raises(BadInputError, match=r"sources\.0\.path = \"gopher://x\": no file system for it"):
        find("gopher://x")
    with pytest.raises(BadInputError, match="no such folder"):
        find("memory://nothing/here")

    def refuse(path: str) -> Any:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInputError, match=r"cannot be listed \(Permission denied: .*\); make it readable"):
        find(tmp_path)


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("data_pipeline.inputs.streams.open", refuse, raising=False)
    with pytest.raises(BadInputError, match=r"sources\.0: .*a\.jsonl: cannot be read \(Permission denied\); restore"):
        find(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_bytes(LINE)
    with pytest.raises(BadInputError, match="the file's name is not UTF-8"):
        find(tmp_path)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_sources_can_be_urls(tmp_path: Path, read: Read, kind: str) -> None:
    url = f"file://{tmp_path}/dumps" if kind == "file" else f"memory://{tmp_path.name}/dumps"
    for name, content in (("a.jsonl", LINE * 9), ("deep/b.txt.gz", b""), ("deep/c.md", b"c"), ("d.css", b"")):
        file_system, path = fsspec.core.url_to_fs(f"{url}/{name}")
        file_system.makedirs(path.rpartition("/")[0], exist_ok=True)
        with file_system.open(path, "wb") as file:
            file.write(content)
    reading = read(url, piece_bytes=30)
    assert [table.name for table in reading.tables] == ["dumps"]
    assert names(reading.tables[0]) == ["a.jsonl", "deep/b.txt.gz", "deep/c.md"]
    assert reading.tables[0].left_out == {"*.css": 1}
    assert reading.texts == ["a"] * 9 + ["c"]
    assert reading.reasons == ["damaged"]
    assert len(reading.pieces) > 3


def test_inputs_that_change_or_vanish_during_a_run_end_it(tmp_path: Path, read: Read) -> None:
    from data_pipeline.inputs.piece_reader import PieceReader

    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "a.jsonl"
    path.write_bytes(LINE)
    reading = read(folder)
    reader = PieceReader(reading.folder / "scratch" / "pieces.jsonl", reading.folder, 1000)
    path.write_bytes(LINE * 2)
    with pytest.raises(BadInputError, match="has 28 bytes, and had 14 when the run began"):
        list(reader.run(None, 0, 1))
    path.unlink()
    folder.rmdir()
    with pytest.raises(BadInputError, match=r"a\.jsonl: cannot be read \(No such file or directory\)"):
        list(reader.run(None, 0, 1))
