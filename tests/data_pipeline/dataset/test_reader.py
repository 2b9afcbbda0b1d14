"""Opening a data set: whatever is wrong is one line with the file and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.dataset.reader import Provenance, open_dataset
from launch.settings import BadInputError


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


SHARD = "train/shard_00000"
DAMAGE: list[tuple[str, Callable[[Path], object], str, bool]] = [
    ("no manifest", lambda f: (f / "manifest.json").unlink(), "has no manifest.json", False),
    ("not JSON", lambda f: (f / "manifest.json").write_text("{"), "manifest.json: line 1", False),
    ("no shard", lambda f: (f / f"{SHARD}.bin").unlink(), f"{SHARD}.bin: named by the manifest but missing", False),
    ("no index", lambda f: (f / f"{SHARD}.idx").unlink(), f"{SHARD}.idx: named by the manifest but missing", False),
    ("truncated", lambda f: os.truncate(f / f"{SHARD}.bin", 50), f"{SHARD}.bin: truncated: 50 bytes", False),
    ("sidecar", lambda f: os.truncate(f / f"{SHARD}.documents", 48), f"{SHARD}.documents: truncated: 48", False),
    ("ends", lambda f: os.truncate(f / f"{SHARD}.bin.index", 8), f"{SHARD}.bin.index: truncated: 8", False),
    ("longer", lambda f: (f / f"{SHARD}.bin").open("ab").write(b"x"), f"{SHARD}.bin: wrong size", False),
    ("index", lambda f: overwrite(f / f"{SHARD}.idx", 0, b"NOT"), f"{SHARD}.idx: bad header", False),
    ("edited", lambda f: overwrite(f / f"{SHARD}.bin", 6, b"\x05\0"), f"{SHARD}.bin: wrong sha256", True),
    ("edited ends", lambda f: overwrite(f / f"{SHARD}.bin.index", 0, b"\2"), f"{SHARD}.bin.index: wrong sha256", True),
    ("edited origin", lambda f: overwrite(f / f"{SHARD}.documents", 9, b"\2"), "documents: wrong sha256", True),
    ("tokenizer", lambda f: overwrite(f / "tokenizer/tokenizer.model", 40, b"\0\0"), "model: wrong sha256", True),
    ("sources", lambda f: overwrite(f / "sources.json", 3, b"!"), "sources.json: wrong sha256", True),
    ("outside", lambda f: change_manifest(f, lambda m: m["tokenizer"].update(file="../x")), "tokenizer.file", False),
    ("absolute", lambda f: change_manifest(f, lambda m: m["tokenizer"].update(file="/x")), "tokenizer.file", False),
    ("shard outside", lambda f: rename_shard(f, "../shard_00000"), "train.shards.0.files.tokens.file", False),
    (
        "other shard",
        lambda f: rename_shard(f, "train/shard_00001", "tokens"),
        "must be 'train/shard_00001.bin.i",
        False,
    ),
    ("unknown key", lambda f: change_manifest(f, lambda m: m.update(extra=1)), "extra = 1: unknown key", False),
    ("version", lambda f: change_manifest(f, lambda m: m.update(format_version=1)), "format_version = 1", False),
    ("end id", lambda f: change_manifest(f, lambda m: m.update(end_token_id=320)), "end_token_id = 320", False),
    ("domains", lambda f: change_manifest(f, lambda m: m.update(domains=["a", "b"])), "fingerprint = ", False),
    ("dtype", lambda f: change_manifest(f, lambda m: m.update(vocab_size=70_000)), "vocab_size = 70000", False),
]


def rename_shard(folder: Path, stem: str, only: str | None = None) -> None:
    suffixes = {"tokens": ".bin", "document_ends": ".bin.index", "documents": ".documents", "megatron_index": ".idx"}

    def change(values: dict[str, Any]) -> None:
        for kind, suffix in suffixes.items():
            if only in (None, kind):
                values["train"]["shards"][0]["files"][kind]["file"] = stem + suffix

    change_manifest(folder, change)


@pytest.mark.parametrize(("_name", "damage", "message", "verify"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_damage_is_one_line_that_names_the_file(
    made: Path, _name: str, damage: Callable[[Path], object], message: str, verify: bool
) -> None:
    open_dataset(made, verify=True)
    damage(made)
    with pytest.raises(BadInputError) as caught:
        open_dataset(made, verify)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_names_the_command_that_prepares_it(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"python data_pipeline/main\.py --config configs/data/demo\.json"):
        open_dataset(tmp_path / "no")


@pytest.mark.parametrize("suffix", [".bin", ".bin.index", ".documents", ".idx"])
def test_a_link_out_of_the_folder_is_refused(made: Path, tmp_path: Path, suffix: str) -> None:
    (made / (SHARD + suffix)).rename(tmp_path / "elsewhere")
    (made / (SHARD + suffix)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInputError, match=r"manifest\.json: .*shard_00000"):
        open_dataset(made)


def test_files_that_the_manifest_does_not_list_are_never_opened(made: Path) -> None:
    before = open_dataset(made, verify=True).split("train").total_tokens
    (made / "train" / "shard_00002.bin").write_bytes(b"\xff" * 64)
    (made / "train" / "shard_00002.idx").write_bytes(b"nonsense")
    assert open_dataset(made, verify=True).split("train").total_tokens == before


def test_a_damaged_token_or_domain_is_caught_when_it_is_read(made: Path) -> None:
    overwrite(made / f"{SHARD}.bin", 2 * 7, b"\xff\xff")
    overwrite(made / f"{SHARD}.documents", 24 + 22, b"\x09\0")
    stream = open_dataset(made).split("train")
    stream.read(8, 20)
    with pytest.raises(BadInputError, match="not below vocab_size = 320"):
        stream.read(0, 8)
    first, second = (int(end) for end in stream.shards[0].document_ends[:2])
    stream.domain_ids(0, first)
    with pytest.raises(BadInputError, match="a domain id"):
        stream.domain_ids(first - 1, second - first)


def test_the_wrong_tokenizer_is_refused_when_it_is_used(made: Path) -> None:
    path = made / "tokenizer/tokenizer.model"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    dataset = open_dataset(made)
    with pytest.raises(BadInputError, match=r"tokenizer\.model: wrong sha256"):
        _ = dataset.tokenizer


def test_documents_know_where_they_came_from(made: Path) -> None:
    dataset = open_dataset(made)
    first, second = dataset.split("train").shards
    assert dataset.provenance(first, 3) == Provenance("dump", "b.jsonl", 300)
    assert dataset.provenance(second, 2) == Provenance("books", "c.txt", 0)
    overwrite(made / f"{SHARD}.documents", 16, b"\x07")
    with pytest.raises(BadInputError, match="from file 7 of source 0, which is not in the table"):
        dataset.provenance(open_dataset(made).split("train").shards[0], 0)


def test_too_many_shards_for_the_machine_is_one_line_with_the_setting(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("data_pipeline.dataset.reader.SPARE_FILES", 5000)
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 10_000))
    monkeypatch.setattr("resource.setrlimit", lambda _, limits: asked.append(limits))
    open_dataset(made)
    assert asked == [(5009, 10_000)]
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))
    with pytest.raises(BadInputError, match=r"3 shards need 5009 open files.*shards\.max_tokens"):
        open_dataset(made)


def test_a_stream_reads_across_shards_as_one_array(made: Path) -> None:
    stream = open_dataset(made).split("train")
    whole = np.concatenate([np.asarray(shard.tokens, dtype=np.int64) for shard in stream.shards])
    domains = np.concatenate(
        [
            np.repeat(shard.domain_ids, np.diff(shard.document_ends.astype(np.int64), prepend=0))
            for shard in stream.shards
        ]
    )
    assert len(stream.shards) == 2
    edge = stream.shards[0].tokens.size
    for start, count in [(0, stream.total_tokens), (edge - 3, 6), (edge, 1), (5, 0), (stream.total_tokens - 1, 1)]:
        np.testing.assert_array_equal(stream.read(start, count), whole[start : start + count])
        np.testing.assert_array_equal(stream.domain_ids(start, count), domains[start : start + count])
    for start, count in [(-1, 2), (0, stream.total_tokens + 1)]:
        with pytest.raises(IndexError):
            stream.read(start, count)
