"""One owner of a run directory: a process of an older start commits nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from fake_engine import IDENTITY, FakeEngine, Run
from file_operations import files_below

from launch.settings import BadInputError
from pretrain.checkpoint import Fence, RunIdentity, StaleRunError
from pretrain.checkpoint import commit as commit_module
from pretrain.checkpoint import share as share_module
from pretrain.metrics import MetricsFile, read_metrics


def test_each_start_takes_the_next_generation(tmp_path: Path) -> None:
    generations = []
    for _ in range(3):
        fence = Fence(tmp_path)
        fence.take(tmp_path / "checkpoints")
        fence.check()
        generations.append(json.loads((tmp_path / "generation.json").read_text())["generation"])
    assert generations == [1, 2, 3]


def test_of_two_starts_at_once_exactly_one_holds_the_fence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both read the same number before either writes."""
    fences = [Fence(tmp_path), Fence(tmp_path)]
    monkeypatch.setattr(Fence, "_newest", lambda self: {})
    assert [fence.take(tmp_path / "checkpoints") for fence in fences] == [1, 1]
    monkeypatch.undo()
    fences[1].check()
    with pytest.raises(StaleRunError):
        fences[0].check()


def test_a_fence_that_was_never_taken_allows_nothing(tmp_path: Path) -> None:
    with pytest.raises(StaleRunError):
        Fence(tmp_path).check()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"generation": "3"}'])
def test_a_generation_file_that_is_none_ends_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation.json").write_text(text)
    with pytest.raises(BadInputError, match=r"generation\.json: not a generation record"):
        Run(tmp_path)


def test_a_stale_process_commits_nothing_and_says_so_in_one_line(tmp_path: Path) -> None:
    stale = Run(tmp_path, keep_last=1)
    stale.save(1)
    stale.save(2)
    current = Run(tmp_path, keep_last=9)
    current.save(3)
    before = files_below(current.checkpoints)
    with pytest.raises(StaleRunError) as error:
        stale.save(4)
    assert "generation 2 was started by process" in str(error.value)
    assert "\n" not in str(error.value)
    assert files_below(current.checkpoints) == before, "no manifest, no latest, nothing pruned, nothing left over"
    current.save(5)
    assert current.steps == [2, 3, 5]


# Where a stale process may be while a new start takes over: each is a function of the save that is held there.
PLACES = {
    "before_its_first_file": (share_module, "HashedFile"),
    "while_it_reads_back": (share_module, "read_back"),
    "before_it_writes_the_manifest": (commit_module, "write_manifest"),
    "before_it_renames": (commit_module, "_make_way"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_process_that_slept_anywhere_in_a_save_commits_nothing_when_it_wakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    stale = Run(tmp_path, keep_last=1)
    stale.save(1)
    asleep, wake = threading.Event(), threading.Event()
    module, name = PLACES[place]
    original = getattr(module, name)

    def held(*arguments: Any) -> Any:
        if not asleep.is_set():
            asleep.set()
            assert wake.wait(60)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, held)
        stale.save(2, wait=False)
        assert asleep.wait(60)
    current = Run(tmp_path, keep_last=9)
    assert current.resumed is not None
    assert current.resumed.step == 1
    before = current.steps
    wake.set()
    with pytest.raises(StaleRunError):
        stale.checkpointer.wait()
    assert current.steps == before == [1]
    assert (current.checkpoints / "latest").read_text() == "step_00000001\n"
    current.save(2, weight=5)
    assert Run(tmp_path).engine.weight.tolist() == [5, 5, 5]


def test_a_commit_that_a_start_raced_with_is_seen_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The earlier process commits after the new start looked, and before it took over."""
    earlier = Run(tmp_path)
    earlier.save(1)
    original = Fence.take

    def late(self: Fence, checkpoints: Path) -> int:
        if not self.taken and earlier.steps == [1]:
            earlier.save(2)
        return original(self, checkpoints)

    monkeypatch.setattr(Fence, "take", late)
    current = Run(tmp_path)
    assert current.resumed is not None
    assert current.resumed.step == 2


def test_a_start_that_was_overtaken_while_it_loaded_ends_before_it_touches_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path).save(1)
    original = FakeEngine.load

    def slow(self: FakeEngine, folder: Path, tag: str) -> None:
        monkeypatch.undo()
        Run(tmp_path)
        original(self, folder, tag)

    monkeypatch.setattr(FakeEngine, "load", slow)
    with pytest.raises(StaleRunError):
        Run(tmp_path)


def test_a_start_that_is_refused_leaves_the_running_one_alone(tmp_path: Path) -> None:
    running = Run(tmp_path)
    running.save(1)
    with pytest.raises(BadInputError, match="another model"):
        Run(tmp_path, RunIdentity(model={"dim": 1}, data=IDENTITY.data, topology=IDENTITY.topology))
    running.save(2)
    assert running.steps == [1, 2]


def test_lines_of_a_stale_process_do_not_reach_the_metrics_of_the_new_one(tmp_path: Path) -> None:
    """A start replaces the file, so the earlier process goes on writing into one that has no name."""
    path = tmp_path / "metrics.jsonl"
    stale = MetricsFile(path, resumed_step=0)
    for step in (1, 2, 3):
        stale.append({"step": step, "loss": 1.0})
    current = MetricsFile(path, resumed_step=2)
    stale.append({"step": 4, "loss": 666.0})
    current.append({"step": 3, "loss": 2.0})
    stale.append({"step": 5, "loss": 666.0})
    stale.close()
    current.append({"step": 4, "loss": 3.0})
    current.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0)]
