"""launch/files.py: a file is whole or absent, and a name cannot lead out of its folder."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.files import path_inside, sha256_of, write_atomically, write_json_atomically


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "f").write_bytes(content)
    assert sha256_of(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "f"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_simultaneous_writers_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "f"
    contents = [bytes([65 + writer]) * 200_000 for writer in range(4)]
    failures: list[Exception] = []

    def write_often(content: bytes) -> None:
        try:
            for _ in range(5):
                write_atomically(path, content)
                assert path.read_bytes() in contents
        except Exception as error:  # reported in the main thread
            failures.append(error)

    threads = [threading.Thread(target=write_often, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_bytes(b"")
    write_atomically(tmp_path / "f", b"")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_is_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "f", {"b": 1, "a": [2.5, None]})
    text = (tmp_path / "f").read_text()
    assert text.endswith("}\n")
    assert text.index('"a"') < text.index('"b"')
    assert json.loads(text) == {"b": 1, "a": [2.5, None]}


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/etc/passwd", "a/..", "out/x", "loop", "nul\0"])
def test_a_name_that_is_not_inside_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ValueError):  # noqa: PT011  (the message is pathlib's for one of them)
        path_inside(folder, name)


def test_an_absolute_path_inside_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"):
        path_inside(tmp_path, str(tmp_path / "f"))


@given(st.lists(st.text(st.characters(blacklist_characters="/\0", codec="utf-8"), min_size=1, max_size=9), min_size=1))
def test_a_path_is_inside_whenever_one_comes_back(parts: list[str]) -> None:
    folder = Path("/nonexistent/folder")
    try:
        path = path_inside(folder, "/".join(parts))
    except ValueError:
        assert ".." in parts or set(parts) <= {"."}
    else:
        assert folder in path.parents
