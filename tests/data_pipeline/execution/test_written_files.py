"""What a block of code wrote is known, however it went about it."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipeline.execution.written_files import written_files


def test_files_written_in_any_way_are_seen_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stage"
    (folder / "deep").mkdir(parents=True)
    (folder / "read").write_text("before")
    (folder / "append").write_text("before")
    monkeypatch.chdir(folder)
    with written_files(Path("../stage")) as written:
        (folder / "path").write_text("x")
        with gzip.open("deep/relative.gz", "wb") as file:
            file.write(b"x")
        with fsspec.open(str(folder / "fs.zst"), "wt", compression="zstd") as file:
            file.write("x")
        np.arange(3).tofile(folder / "array")
        os.close(os.open(folder / "low", os.O_CREAT | os.O_RDWR))
        (folder / "temporary").write_text("x")
        os.replace(folder / "temporary", folder / "renamed")
        os.link(folder / "renamed", folder / "linked")
        with (folder / "append").open("a") as file:
            file.write("more")
        (folder / "removed").write_text("x")
        (folder / "removed").unlink()
        (folder / "read").read_text()
        (tmp_path / "elsewhere").write_text("x")
    (folder / "later").write_text("x")
    expected = {"path", "deep/relative.gz", "fs.zst", "array", "low", "renamed", "linked", "append"}
    assert written == expected


def test_two_at_once_are_refused_and_an_error_ends_the_first(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nested"), written_files(tmp_path), written_files(tmp_path):
        pass
    with written_files(tmp_path) as written:
        (tmp_path / "file").write_text("x")
    assert written == {"file"}
