"""A data set is published or absent: a full disk leaves what was there, and a newer one replaces all of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.dataset import publish as module
from data_pipeline.dataset.publish import build_manifest, is_published
from data_pipeline.dataset.reader import open_dataset
from launch.settings import BadInputError

PublishTo = Callable[[Path, Path], Path]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill_the_disk_after(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hard links, and room for so many copies."""
    left = iter(range(copies))

    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def copyfile(source: Path, target: Path) -> None:
        if next(left, None) is None:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copyfile", copyfile)


@pytest.mark.parametrize("copies", [0, 1, 5, 14])
def test_a_disk_that_fills_while_publishing_leaves_no_half_data_set(
    made_stage: Path, tmp_path: Path, publish_to: PublishTo, monkeypatch: pytest.MonkeyPatch, copies: int
) -> None:
    fill_the_disk_after(copies, monkeypatch)
    with pytest.raises(BadInputError, match=r"out: cannot be written \(No space left on device\); make room"):
        publish_to(made_stage, tmp_path / "out")
    assert everything(tmp_path / "out") == {}


def test_a_disk_that_fills_for_the_manifest_itself_leaves_no_half_data_set(
    made_stage: Path, tmp_path: Path, publish_to: PublishTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_atomically", write)
    with pytest.raises(BadInputError, match="No space left on device"):
        publish_to(made_stage, tmp_path / "out")
    assert everything(tmp_path / "out") == {}


def test_a_disk_that_fills_leaves_an_older_data_set_whole(
    made: Path,
    made_texts: list[str],
    tmp_path: Path,
    stage_of: Callable[..., Path],
    publish_to: PublishTo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = everything(made)
    other = stage_of(tmp_path / "other", [text.upper() for text in made_texts])
    with monkeypatch.context() as patch:
        fill_the_disk_after(9, patch)
        with pytest.raises(BadInputError, match="No space left on device"):
            publish_to(other, made)
    assert everything(made) == before
    open_dataset(made, verify=True)
    publish_to(other, made)
    assert open_dataset(made, verify=True).manifest.fingerprint != json.loads(before["manifest.json"])["fingerprint"]


def test_files_of_an_earlier_data_set_go_and_other_peoples_stay(
    made: Path, tmp_path: Path, publish_to: PublishTo
) -> None:
    for name in ("train/shard_00007.bin", "train/shard_00000.tokens", "tokenizer/tokenizer.json", "train/notes.txt"):
        (made / name).write_bytes(b"old")
    publish_to(tmp_path / "stage", made)  # the same files again: links to themselves
    assert sorted(path.name for path in made.glob("train/*")) == sorted(
        [f"shard_0000{n}{suffix}" for n in (0, 1) for suffix in (".bin", ".bin.index", ".documents", ".idx")]
        + ["notes.txt"]
    )
    assert [path.name for path in made.glob("tokenizer/*")] == ["tokenizer.model"]


def test_without_a_table_of_sources_provenance_is_unknown(made_stage: Path, tmp_path: Path) -> None:
    manifest, places = build_manifest("made", made_stage, made_stage / "tokenizer.model", ("law", "prose"), "0" * 64)
    module.publish(manifest, places, {}, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert dataset.manifest.sources is None
    assert dataset.provenance(dataset.split("train").shards[0], 0) is None


def test_a_data_set_counts_as_published_only_while_its_files_are_what_they_were(made: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    manifest, places = build_manifest("made", stage, stage / "tokenizer.model", ("law", "prose"), "0" * 64)
    module.publish(manifest, places, {}, made)
    assert is_published(manifest, places, made)
    # Of the same size and no link to the stage's: what counts is the content.
    shard = made / "train/shard_00001.bin"
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content)
    assert is_published(manifest, places, made)
    shard.write_bytes(content[:-2] + b"\7\0")
    assert not is_published(manifest, places, made)
    shard.write_bytes(content)
    os.truncate(made / "train/shard_00001.documents", 24)
    assert not is_published(manifest, places, made)
