"""A process that dies at any file operation of a save leaves a loadable checkpoint: proven for every one of them.

A forked child starts the run, saves, and dies before operation k (which is after operation k - 1), or in the middle of
a write; for every k there is. Then a new start must find the new checkpoint if and only if it was committed, the one
before to the byte otherwise, and be able to save again.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_engine import Run
from file_operations import DIED, Death, FileOperations, Operation, files_below

from pretrain.checkpoint import MANIFEST, TrainingState

pytestmark = pytest.mark.timeout(1200)  # a minute where nothing else runs

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Scenario:
    """What lies in the run directory, and what the start that dies does there."""

    prepare: Callable[[Path], None]
    act: Callable[[Path], None]
    section: dict[str, Any]
    new_weight: float


def nothing(folder: Path) -> None:
    pass


def two_checkpoints_and_the_remains_of_dead_saves(folder: Path) -> None:
    run = Run(folder, plain_weights=True)
    run.save(1)
    run.save(2)
    for name in ("partial_step_00000003_dead_1", "dead_partial_step_00000003_dead_2"):
        (run.checkpoints / name / "content" / "engine").mkdir(parents=True)
        (run.checkpoints / name / "content" / "engine" / "weight.pt").write_bytes(b"half")


def one_checkpoint(folder: Path) -> None:
    Run(folder).save(2)


def a_checkpoint_that_a_dead_start_had_set_aside(folder: Path) -> None:
    run = Run(folder)
    run.save(2)
    (run.checkpoints / "step_00000002").rename(run.checkpoints / "step_00000002.replaced")


def three_checkpoints(folder: Path) -> None:
    run = Run(folder)
    for step in (1, 2, 3):
        run.save(step)


def save_step_3(folder: Path) -> None:
    Run(folder, keep_last=2, plain_weights=True).save(3)


def save_step_2_again(folder: Path) -> None:
    Run(folder, keep_last=1).save(2, weight=7)


def save_the_first(folder: Path) -> None:
    Run(folder, keep_last=1, asynchronous=False).save(2, weight=7)


def roll_back_and_save(folder: Path) -> None:
    run = Run(folder)
    run.checkpointer.resume(newest_step=1)
    run.save(1, weight=7)


SCENARIOS = {
    "a_later_step_with_pruning": Scenario(
        two_checkpoints_and_the_remains_of_dead_saves, save_step_3, {"keep_last": 2, "plain_weights": True}, 3
    ),
    "the_same_step_again": Scenario(one_checkpoint, save_step_2_again, {"keep_last": 1}, 7),
    "the_same_step_set_aside_before": Scenario(
        a_checkpoint_that_a_dead_start_had_set_aside, save_step_2_again, {"keep_last": 1}, 7
    ),
    "the_first_save": Scenario(nothing, save_the_first, {"keep_last": 1}, 7),
    "a_rollback": Scenario(three_checkpoints, roll_back_and_save, {}, 7),
}


WITH_TORN_WRITES = "a_later_step_with_pruning"  # the same files are written in the others


@pytest.fixture(scope="module")
def workplace() -> Iterator[Path]:
    """A folder where syncing costs nothing: hundreds of saves are made here."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def in_child(action: Callable[[], Any], operations: FileOperations) -> tuple[int, Any]:
    """Status of a forked process that ran ``action`` under ``operations``, and what it recorded."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            operations.install()
            action()
            found = pickle.dumps((operations.done, operations.unnumbered()))
            os.close(readable)
            with os.fdopen(writable, "wb") as pipe:
                pipe.write(found)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        recorded = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), pickle.loads(recorded) if recorded else None


def committing(operations: list[Operation]) -> int:
    """The number of the one operation that makes the new checkpoint exist: the rename of its folder."""
    found = [number for number, each in enumerate(operations) if each.kind == "rename" and "/content" in each.path]
    assert len(found) == 1
    return found[0]


def names_below(checkpoints: Path) -> set[str]:
    """What lies there; a start may mark what is dead."""
    return {name.removeprefix("dead_") for name in os.listdir(checkpoints)} if checkpoints.exists() else set()


def copy_of(base: Path) -> Path:
    """``base`` anew, under one path for all."""
    folder = base.with_name("run")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_death_at_any_file_operation_leaves_a_loadable_checkpoint(workplace: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    base = workplace / name
    base.mkdir()
    scenario.prepare(base)
    before = {path.name: files_below(path) for path in (base / "checkpoints").glob("step_*")}

    def act() -> None:
        scenario.act(base.with_name("run"))

    copy_of(base)
    status, (operations, unnumbered) = in_child(act, FileOperations())
    assert status == 0
    assert unnumbered == {}, "the interpreter saw operations that were not numbered"
    commit = committing(operations)

    deaths = [Death(number, "before") for number in range(len(operations))]
    if name == WITH_TORN_WRITES:
        deaths += [Death(number, "torn") for number, each in enumerate(operations) if each.kind == "write"]
    assert len(deaths) > 50
    for death in deaths:
        folder = copy_of(base)
        status, _ = in_child(act, FileOperations(death))
        assert status == DIED, death
        told = f"died {death.moment} {death.number}: {operations[death.number]}"
        left = names_below(folder / "checkpoints")
        start = Run(folder, **scenario.section)
        if death.number > commit:
            assert start.resumed is not None, told
            assert start.engine.weight[0] == scenario.new_weight, told
        else:
            assert_resumed_one_of(before, start, told)
        assert names_below(start.checkpoints) == left, f"{told}: a start removes nothing"

        step = 1 + (start.resumed.step if start.resumed else 0)
        saved = start.save(step, weight=9)
        assert start.said == [], told
        assert not [each for each in start.folders if not each.startswith("step_")], f"{told}: remains were left"
        assert Run(folder, **scenario.section).resumed == saved, told


def assert_resumed_one_of(before: dict[str, dict[str, bytes]], start: Run, told: str) -> None:
    """The newest that is there is an old one, byte for byte (a rollback removes newer ones first)."""
    if not before:
        assert start.resumed is None, told
        return
    assert isinstance(start.resumed, TrainingState), told
    newest = max(path.parent for path in start.checkpoints.glob(f"step_*/{MANIFEST}"))
    found = files_below(newest)
    assert found in before.values(), told
    assert newest.name.removesuffix(".replaced") == f"step_{start.resumed.step:08d}", told


def test_every_byte_of_a_checkpoint_was_seen_and_synced_before_its_name(workplace: Path) -> None:
    """What a loss of power would need: synced files, then synced folders, then the manifest, then the name."""
    base = workplace / "synced"
    base.mkdir()
    two_checkpoints_and_the_remains_of_dead_saves(base)
    folder = copy_of(base)
    status, (operations, _) = in_child(lambda: save_step_3(folder), FileOperations())
    assert status == 0
    commit = committing(operations)
    content = operations[commit].path
    last: dict[tuple[str, str], int] = {(each.kind, each.path): number for number, each in enumerate(operations)}
    seen: dict[str, int] = {}
    for each in operations[:commit]:
        if each.kind == "write":
            seen[each.path] = seen.get(each.path, 0) + each.bytes

    manifest_named = next(
        number
        for number, each in enumerate(operations)
        if each.kind == "replace" and Path(each.path).name.startswith(f".{MANIFEST}")
    )
    checkpoint = folder / "checkpoints" / "step_00000003"
    files = files_below(checkpoint)
    assert len(files) == 8
    for name, held in files.items():
        # The manifest is written under another name first.
        written = operations[manifest_named].path if name == MANIFEST else f"{content}/{name}"
        assert seen[written] == len(held), name
        assert last["write", written] < last["fsync", written] < (manifest_named if name != MANIFEST else commit), name
        if name != MANIFEST:
            assert last["open", written] < last["fsync", str(Path(written).parent)] < commit, name
    folders = {f"{content}/{path.relative_to(checkpoint)}" for path in checkpoint.rglob("*") if path.is_dir()}
    for each in folders:
        assert last["fsync", each] < commit
        assert last["mkdir", each] < last["fsync", content] < commit
    assert manifest_named < max(
        number for number, each in enumerate(operations[:commit]) if each == Operation("fsync", content)
    ), "the manifest's name is synced before the checkpoint gets its own"

    after = operations[commit + 1 :]
    assert after[0] == Operation("fsync", str(folder / "checkpoints")), "the checkpoint's name is synced at once"
    named = next(n for n, each in enumerate(after) if each.kind == "replace" and ".latest" in each.path)
    removed = next(n for n, each in enumerate(after) if each.kind in ("unlink", "rmdir"))
    assert named < removed, "nothing is removed before latest says where to look"
    assert Path(after[removed].path).name == MANIFEST, "a removal begins with the manifest"
