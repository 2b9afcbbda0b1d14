"""Saving, pruning and resuming, in one process and with an engine of two tensors."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import IDENTITY, FakeEngine, Run, steps_in

from launch.settings import BadInputError
from pretrain.checkpoint import LATEST, MANIFEST, SaveFailedError
from pretrain.checkpoint import share as share_module

HOLD_SECONDS = 60


class HeldStorage:
    """Files that are not opened until ``release``, or fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.released = threading.Event(), threading.Event()
        self.problem: Exception | None = None
        original = share_module.HashedFile

        def held(*arguments: Any) -> Any:
            self.entered.set()
            assert self.released.wait(HOLD_SECONDS)
            if self.problem is not None:
                raise self.problem
            return original(*arguments)

        monkeypatch.setattr(share_module, "HashedFile", held)

    def release(self) -> None:
        self.released.set()


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldStorage]:
    held = HeldStorage(monkeypatch)
    yield held
    held.problem = None
    held.release()


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(share_module, "HashedFile", fail)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_resume_restores_state_weights_biases_and_every_generator(tmp_path: Path, asynchronous: bool) -> None:
    first = Run(tmp_path, asynchronous=asynchronous)
    assert first.resumed is None
    state = first.save(3, validation_bits_per_byte=1.25, stability={"losses": [1.5, 2.0], "skipped": {"nan": 1}})
    expected = (random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(2).tolist())
    second = Run(tmp_path)
    assert second.resumed == state
    assert second.engine.weight.tolist() == [3, 3, 3]
    assert second.engine.bias.tolist() == [0.375, 0.375]
    assert (random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(2).tolist()) == expected
    assert second.said == []
    assert (second.checkpoints / LATEST).read_text() == "step_00000003\n"
    assert second.folders == ["step_00000003"]


def test_a_state_of_an_older_version_takes_the_defaults_of_what_it_did_not_record(tmp_path: Path) -> None:
    first = Run(tmp_path)
    state = first.save(3)
    path = first.checkpoints / "step_00000003" / "state.json"
    record = json.loads(path.read_text())
    del record["stability"], record["validation_bits_per_byte"]
    path.write_text(json.dumps(record))
    manifest = json.loads((path.parent / MANIFEST).read_text())
    del manifest["files"]["state.json"]
    (path.parent / MANIFEST).write_text(json.dumps(manifest))
    assert Run(tmp_path).resumed == state


def test_training_goes_on_while_a_save_is_written_and_changes_nothing_in_it(
    tmp_path: Path, storage: HeldStorage
) -> None:
    run = Run(tmp_path)
    run.save(1, wait=False)
    assert storage.entered.wait(HOLD_SECONDS)
    run.engine.weight.fill_(99)  # the next steps
    run.engine.bias.fill_(99)
    run.checkpointer.poll()
    assert run.steps == []
    storage.release()
    assert run.checkpointer.wait()
    again = Run(tmp_path)
    assert again.engine.weight.tolist() == [1, 1, 1]
    assert again.engine.bias.tolist() == [0.125, 0.125]


def test_two_saves_never_overlap_and_the_second_says_how_long_it_waited(tmp_path: Path, storage: HeldStorage) -> None:
    run = Run(tmp_path)
    run.save(1, wait=False)
    threading.Timer(1.5, storage.release).start()
    run.save(2, wait=False)
    assert run.steps[0] == 1, "the second began before the first was committed"
    assert len(run.said) == 1
    assert run.said[0].startswith("checkpoint of step 2: waited ")
    assert run.checkpointer.wait()
    assert run.steps == [1, 2]


def test_a_failed_write_is_told_at_the_next_step_and_the_next_save_tries_again(
    tmp_path: Path, storage: HeldStorage
) -> None:
    run = Run(tmp_path, max_failed_saves=2)
    storage.problem = OSError(28, "No space left on device")
    run.save(1, wait=False)
    run.checkpointer.poll()
    assert run.said == []
    storage.release()
    assert not run.checkpointer.wait()
    assert run.said == [
        "checkpoint of step 1 could not be written: rank 0: OSError: [Errno 28] No space left on device; the "
        "checkpoints before it are untouched; the next save tries again (failure 1 of 2 in a row)"
    ]
    run.checkpointer.poll()
    assert len(run.said) == 1, "told once"
    storage.problem = None
    run.save(2)
    assert run.checkpointer.wait()
    assert run.folders == ["step_00000002"], "what the failed one left is gone"
    storage.problem = OSError(5, "Input/output error")
    run.save(3)
    assert "failure 1 of 2" in run.said[-1], "a success in between ends the row"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_too_many_failures_in_a_row_stop_the_run_and_keep_the_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    run = Run(tmp_path, max_failed_saves=3, keep_last=1, asynchronous=asynchronous)
    good = run.save(1)
    with monkeypatch.context() as patch:
        full_disk(patch)
        run.save(2)
        run.save(3)
        with pytest.raises(SaveFailedError, match=r"step 4 .* No space left .* 3 saves in a row have failed"):
            run.save(4)
    assert run.steps == [1]
    assert Run(tmp_path).resumed == good


def test_a_write_that_hangs_fails_by_its_time_out_and_no_save_overlaps_it(tmp_path: Path, storage: HeldStorage) -> None:
    run = Run(tmp_path, write_timeout_seconds=0.5, max_failed_saves=9)
    run.save(1)
    assert "step 1 could not be written: rank 0: not written in " in run.said[-1]
    assert "checkpoint.write_timeout_seconds" in run.said[-1]
    run.save(2)
    assert "step 2 could not be written: the write before it still hangs" in run.said[-1]
    assert run.steps == []
    storage.release()
    deadline = time.monotonic() + HOLD_SECONDS
    while run.steps != [3] and time.monotonic() < deadline:
        run.save(3)
    assert run.steps == [3], "the given-up write must never be committed"


def test_silent_corruption_by_the_storage_is_found_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, keep_last=1)
    run.save(1)
    original = share_module.read_back

    def corrupted(path: Path, entry: Any) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        original(path, entry)

    monkeypatch.setattr(share_module, "read_back", corrupted)
    run.save(2)
    assert "is not what was written" in run.said[-1]
    assert run.steps == [1]


def test_without_plain_weights_none_are_written(tmp_path: Path) -> None:
    run = Run(tmp_path, plain_weights=False)
    run.save(1)
    assert not (run.checkpoints / "step_00000001" / "weights").exists()
    with_weights = Run(tmp_path, plain_weights=True)
    with_weights.save(2)
    names = {path.name for path in (run.checkpoints / "step_00000002" / "weights").iterdir()}
    assert names == {"config.json", "model-00000.safetensors", "model.safetensors.index.json"}


def test_a_folder_in_the_way_that_is_no_checkpoint_is_replaced(tmp_path: Path) -> None:
    run = Run(tmp_path)
    left_over = run.checkpoints / "step_00000002"
    left_over.mkdir(parents=True)
    (left_over / "garbage").write_bytes(b"half")
    run.save(2)
    assert not (left_over / "garbage").exists()
    assert run.folders == ["step_00000002"]


def test_a_step_that_is_saved_again_replaces_the_older_one(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1)
    run.save(2)
    run.save(2, weight=7)
    assert run.folders == ["step_00000002"]
    assert Run(tmp_path).engine.weight.tolist() == [7, 7, 7]


def test_damage_is_told_and_the_one_before_is_used_until_none_is_left(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2):
        run.save(step)
    for step, resumed in ((2, 1), (1, None)):
        path = run.checkpoints / f"step_{step:08d}" / "engine" / "weight.pt"
        content = bytearray(path.read_bytes())
        content[100] ^= 4
        path.write_bytes(content)
        again = Run(tmp_path, resume=False)
        if resumed is None:
            with pytest.raises(BadInputError, match=r"none of 2 checkpoint\(s\) is intact"):
                again.checkpointer.resume()
        else:
            state = again.checkpointer.resume()
            assert state is not None
            assert state.step == resumed
        assert again.said[0].startswith(
            "checkpoint step_00000002 is damaged and not used: engine/weight.pt has another"
        )


def test_a_rollback_loads_an_older_checkpoint_and_forgets_the_later_ones(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=9)
    states = {step: run.save(step) for step in (2, 4, 6, 8)}
    run.save(9, wait=False)
    assert run.checkpointer.resume(newest_step=5) == states[4]
    assert run.engine.weight.tolist() == [4, 4, 4]
    assert run.steps == [2, 4]
    assert (run.checkpoints / LATEST).read_text() == "step_00000004\n"
    # What was learnt from it is saved under the same step, and is what a new start continues from.
    learnt = run.save(4, stability={"skipped_samples": [50, 60]})
    assert Run(tmp_path).resumed == learnt
    assert run.checkpointer.resume(newest_step=1) is None
    assert run.steps == [2, 4], "nothing was loaded, nothing is removed"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": {"dim": 128}}, "belongs to another model: model.dim was 64, is 128"),
        ({"model": {"dim": 64, "act": True}}, "model.act was False, is True"),
        ({"data": {"fingerprint": "b"}}, "data.fingerprint was 'a', is 'b'"),
        ({"topology": {"ranks": 2}}, "resume on the same topology"),
        ({"topology": {"ranks": 1, "zero_stage": 3, "dtype": "fp16"}}, "topology.dtype was None, is 'fp16'"),
    ],
)
def test_a_resume_with_another_identity_names_the_change(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    Run(tmp_path).save(1)
    other = replace(IDENTITY, **changed)
    with pytest.raises(BadInputError) as error:
        Run(tmp_path, other)
    assert told in str(error.value)
    part = next(iter(changed))
    if part != "topology":
        assert Run(tmp_path, other, allow_changed=(part,)).resumed is not None


def test_a_checkpoint_of_before_a_field_existed_has_its_default(tmp_path: Path) -> None:
    Run(tmp_path).save(1)
    assert Run(tmp_path, replace(IDENTITY, model={"dim": 64, "core": "ice", "msrd_scales": [1]})).resumed is not None
    with pytest.raises(BadInputError, match=r"model\.core was 'ice', is 'plain'"):
        Run(tmp_path, replace(IDENTITY, model={"dim": 64, "core": "plain"}))


def test_a_run_of_muon_resumes_on_the_same_ranks_only(tmp_path: Path) -> None:
    muon = replace(IDENTITY, topology={"ranks": 2, "zero_stage": 3, "dtype": "fp32", "optimizer": "muon"})
    Run(tmp_path, muon).save(1)
    assert Run(tmp_path, muon).resumed is not None
    with pytest.raises(BadInputError, match=r"topology\.ranks was 2, is 4"):
        Run(tmp_path, replace(muon, topology=muon.topology | {"ranks": 4}))
    with pytest.raises(BadInputError, match=r"topology\.optimizer was 'muon', is None"):
        Run(tmp_path, replace(muon, topology={"ranks": 2, "zero_stage": 3, "dtype": "fp32"}))


def test_the_manifest_names_every_file_but_itself(tmp_path: Path) -> None:
    Run(tmp_path, plain_weights=True).save(1)
    folder = tmp_path / "checkpoints" / "step_00000001"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(files) == found - {MANIFEST}
    assert len(files) == 7


def test_files_that_the_engine_wrote_itself_are_in_the_manifest(tmp_path: Path) -> None:
    class Offloading(FakeEngine):
        def snapshot(self, folder: Path, tag: str, copy: Any) -> dict[str, Any]:
            (folder / tag / "offloaded_tensors").mkdir(parents=True)
            (folder / tag / "offloaded_tensors" / "rank0.swp").write_bytes(b"moments")
            return super().snapshot(folder, tag, copy)

    Run(tmp_path, engine=Offloading()).save(1)
    files = json.loads((tmp_path / "checkpoints" / "step_00000001" / MANIFEST).read_text())["files"]
    assert files["engine/offloaded_tensors/rank0.swp"]["bytes"] == 7
    assert steps_in(tmp_path / "checkpoints") == [1]
