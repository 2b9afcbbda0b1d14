"""What makes a checkpoint usable, looked at from outside: hashes, order, names. Saving and resuming need ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.files import sha256_of
from launch.settings import BadInputError
from pretrain.checkpoint import MANIFEST, find_damage, newest_valid_checkpoint, step_folder_name
from pretrain.checkpoint.layout import committed
from pretrain.checkpoint.retention import remove


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / step_folder_name(step)
    (checkpoint / "engine").mkdir(parents=True)
    files = {"state.json": b"{}", "engine/part.pt": bytes(range(256)) * 8}
    entries = {}
    for name, content in files.items():
        (checkpoint / name).write_bytes(content)
        entries[name] = {"sha256": sha256_of(checkpoint / name), "bytes": len(content)}
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))
    return checkpoint


def test_an_intact_checkpoint_has_no_damage_on_any_share_of_ranks(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    assert [find_damage(checkpoint, rank, 3) for rank in range(3)] == [None] * 3


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda path: path.write_bytes(bytes([1]) + path.read_bytes()[1:]), "sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "2047 bytes, not 2048"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_changed_file_is_found_by_exactly_one_rank_and_the_older_checkpoint_is_used(
    tmp_path: Path, harm: object, told: str
) -> None:
    make_checkpoint(tmp_path, 9)
    newest = make_checkpoint(tmp_path, 10)
    harm(newest / "engine" / "part.pt")  # type: ignore[operator]
    found = [damage for rank in range(2) if (damage := find_damage(newest, rank, 2))]
    assert len(found) == 1
    assert "engine/part.pt" in found[0]
    assert told in found[0]
    assert newest_valid_checkpoint(tmp_path).name == step_folder_name(9)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 9)
    (make_checkpoint(tmp_path, 10) / MANIFEST).unlink()
    assert [path.name for path in committed(tmp_path)] == [step_folder_name(9)]


def test_a_replaced_checkpoint_comes_before_the_one_that_replaces_it(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10).rename(tmp_path / "step_00000010.replaced")
    for step in (10, 9):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_000000notes").mkdir()
    (tmp_path / "step_000000notes" / MANIFEST).write_text("{}")
    names = [step_folder_name(9), "step_00000010.replaced", step_folder_name(10)]
    assert [path.name for path in committed(tmp_path)] == names


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        make_checkpoint(tmp_path, step)
    assert [int(path.name[5:]) for path in committed(tmp_path)] == [7, 99_999_999, 100_000_000]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    (tmp_path / "outside").write_text("x")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": sha256_of(tmp_path / "outside"), "bytes": 1}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    damage = find_damage(checkpoint)
    assert damage is not None
    assert name in damage


def test_a_manifest_that_names_a_file_behind_a_link_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", 10)
    outside = tmp_path / "outside.pt"
    outside.write_bytes((checkpoint / "engine" / "part.pt").read_bytes())
    (checkpoint / "engine" / "part.pt").unlink()
    (checkpoint / "engine" / "part.pt").symlink_to(outside)
    damage = find_damage(checkpoint)
    assert damage is not None
    assert "does not name anything inside" in damage


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"state.json": {}}}'])
def test_a_manifest_that_is_no_manifest_is_damage_not_a_crash(tmp_path: Path, text: str) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    (checkpoint / MANIFEST).write_text(text)
    assert find_damage(checkpoint) is not None


def test_removing_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path, 10)
    monkeypatch.setattr("pretrain.checkpoint.retention.shutil.rmtree", lambda path: None)
    remove(checkpoint)
    assert not (checkpoint / MANIFEST).exists()
    assert (checkpoint / "state.json").exists()


def test_without_any_usable_checkpoint_the_error_says_why(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no checkpoint was committed there"):
        newest_valid_checkpoint(tmp_path)
    (make_checkpoint(tmp_path, 3) / "state.json").unlink()
    with pytest.raises(BadInputError, match=r"step_00000003: state\.json is missing"):
        newest_valid_checkpoint(tmp_path)
