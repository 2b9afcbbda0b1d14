"""Opening a data set: whatever is wrong is one line with the file and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.dataset.reader import open_dataset
from data_pipeline.dataset.shards import HEADER
from launch.settings import BadInputError


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


SHARD = "train/shard_00000.tokens"
DAMAGE: list[tuple[str, Callable[[Path], object], str, bool]] = [
    ("no manifest", lambda f: (f / "manifest.json").unlink(), "has no manifest.json", False),
    ("not JSON", lambda f: (f / "manifest.json").write_text("{"), "manifest.json: line 1", False),
    ("no shard", lambda f: (f / SHARD).unlink(), f"{SHARD}: named by the manifest but missing", False),
    ("truncated", lambda f: os.truncate(f / SHARD, 500), f"{SHARD}: truncated: 500 bytes", False),
    ("longer", lambda f: (f / SHARD).open("ab").write(b"x"), f"{SHARD}: wrong size", False),
    ("header", lambda f: overwrite(f / SHARD, 0, b"NOTASHRD"), f"{SHARD}: bad header", False),
    ("token id", lambda f: overwrite(f / SHARD, HEADER.size, b"\xff\xff"), f"{SHARD}: wrong sha256", True),
    ("tokenizer", lambda f: overwrite(f / "tokenizer/tokenizer.model", 40, b"\0\0"), "model: wrong sha256", True),
    ("outside", lambda f: change_manifest(f, lambda m: m["tokenizer"].update(file="../x")), "tokenizer.file", False),
    ("absolute", lambda f: change_manifest(f, lambda m: m["tokenizer"].update(file="/x")), "tokenizer.file", False),
    ("unknown key", lambda f: change_manifest(f, lambda m: m.update(extra=1)), "extra = 1: unknown key", False),
    ("version", lambda f: change_manifest(f, lambda m: m.update(format_version=2)), "format_version = 2", False),
    ("end id", lambda f: change_manifest(f, lambda m: m.update(end_token_id=420)), "end_token_id = 420", False),
    ("domains", lambda f: change_manifest(f, lambda m: m.update(domains=["a", "b"])), "fingerprint = ", False),
]


@pytest.mark.parametrize(("_name", "damage", "message", "verify"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_damage_is_one_line_that_names_the_file(
    small_dataset: Path, tmp_path: Path, _name: str, damage: Callable[[Path], object], message: str, verify: bool
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_dataset, folder, ignore=shutil.ignore_patterns(".stages"))
    open_dataset(folder, verify=True)
    damage(folder)
    with pytest.raises(BadInputError) as caught:
        open_dataset(folder, verify)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_names_the_command_that_prepares_it(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"python data_pipeline/main\.py --config configs/data/demo\.json"):
        open_dataset(tmp_path / "no")


def test_a_link_out_of_the_folder_is_refused(small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_dataset, folder, ignore=shutil.ignore_patterns(".stages"))
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(small_dataset / SHARD)
    with pytest.raises(BadInputError, match=r"manifest\.json: .*shard_00000"):
        open_dataset(folder)


def test_a_damaged_token_is_caught_when_it_is_read(small_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_dataset, folder, ignore=shutil.ignore_patterns(".stages"))
    overwrite(folder / SHARD, HEADER.size + 2 * 7, b"\xff\xff")
    stream = open_dataset(folder).split("train")
    stream.read(8, 100)
    with pytest.raises(BadInputError, match="not below vocab_size = 420"):
        stream.read(0, 8)


def test_a_stream_reads_across_shards_as_one_array(small_dataset: Path) -> None:
    stream = open_dataset(small_dataset).split("train")
    whole = np.concatenate([np.asarray(shard.tokens, dtype=np.int64) for shard in stream.shards])
    domains = np.concatenate(
        [
            np.repeat(shard.domain_ids, np.diff(shard.document_ends.astype(np.int64), prepend=0))
            for shard in stream.shards
        ]
    )
    assert len(stream.shards) > 2
    edge = stream.shards[0].tokens.size
    for start, count in [(0, stream.total_tokens), (edge - 3, 6), (edge, 1), (5, 0), (stream.total_tokens - 1, 1)]:
        np.testing.assert_array_equal(stream.read(start, count), whole[start : start + count])
        np.testing.assert_array_equal(stream.domain_ids(start, count), domains[start : start + count])
    for start, count in [(-1, 2), (0, stream.total_tokens + 1)]:
        with pytest.raises(IndexError):
            stream.read(start, count)
