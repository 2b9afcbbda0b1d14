"""Saving, pruning and resuming, in one process and with an engine of two tensors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launch.environment import Place
from launch.settings import BadInputError
from model import IceConfig
from pretrain.checkpoint import LATEST, MANIFEST, Checkpointer, RunIdentity, TrainingState
from pretrain.config import CheckpointSection

IDENTITY = RunIdentity(model={"dim": 64}, data={"fingerprint": "a"}, topology={"ranks": 1})


class FakeEngine:
    """What the checkpointer asks of an engine, around one weight and one bias."""

    place = Place(0, 1)
    model_config = IceConfig().scaled_down()

    def __init__(self) -> None:
        self.weight, self.bias = torch.zeros(3), torch.zeros(2)

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        torch.save(self.weight, folder / tag / "weight.pt")

    def load(self, folder: Path, tag: str) -> None:
        self.weight = torch.load(folder / tag / "weight.pt", weights_only=True)

    def selection_biases(self) -> dict[str, Tensor]:
        return {"router.bias": self.bias}

    def plain_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.weight

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass


def checkpointer(folder: Path, identity: RunIdentity = IDENTITY, **section: Any) -> tuple[Checkpointer, list[str]]:
    said: list[str] = []
    engine: Any = FakeEngine()
    return Checkpointer(folder, CheckpointSection(**section), identity, engine, said.append), said


def save(target: Checkpointer, step: int) -> TrainingState:
    engine: Any = target.engine
    engine.weight.fill_(step)
    engine.bias.fill_(step / 8)
    state = TrainingState(step=step, next_sample=10 * step, tokens=100 * step, wandb_id="abc")
    target.save(state)
    return state


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step_")) for path in folder.glob(f"step_*/{MANIFEST}"))


def test_a_resume_restores_state_weights_biases_and_every_generator(tmp_path: Path) -> None:
    first, _ = checkpointer(tmp_path)
    assert first.resume() is None
    state = save(first, 3)
    expected = (random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(2).tolist())
    second, said = checkpointer(tmp_path)
    assert second.resume() == state
    engine: Any = second.engine
    assert engine.weight.tolist() == [3, 3, 3]
    assert engine.bias.tolist() == [0.375, 0.375]
    assert (random.random(), np.random.rand(), np.random.standard_normal(), torch.rand(2).tolist()) == expected
    assert said == []
    assert (tmp_path / LATEST).read_text() == "step_00000003\n"


def test_the_last_ones_and_the_chosen_multiples_are_kept(tmp_path: Path) -> None:
    target, _ = checkpointer(tmp_path, keep_last=2, keep_every=4, plain_weights=False)
    for step in range(1, 10):
        save(target, step)
    assert steps_in(tmp_path) == [4, 8, 9]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{step:08d}" for step in (4, 8, 9)]


def test_without_plain_weights_none_are_written(tmp_path: Path) -> None:
    target, _ = checkpointer(tmp_path, plain_weights=False)
    save(target, 1)
    assert not (tmp_path / "step_00000001" / "weights").exists()
    assert target.resume() is not None


def test_a_step_saved_again_replaces_what_a_crash_left(tmp_path: Path) -> None:
    target, _ = checkpointer(tmp_path)
    left_over = tmp_path / "step_00000002"
    left_over.mkdir()
    (left_over / "garbage").write_bytes(b"half")
    assert target.resume() is None
    save(target, 2)
    assert not (left_over / "garbage").exists()
    assert steps_in(tmp_path) == [2]


def test_a_crash_before_the_manifest_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = checkpointer(tmp_path, keep_last=1)
    before = save(target, 1)

    def crash(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, "_commit", crash)
        with pytest.raises(OSError, match="No space left"):
            save(target, 2)
    assert checkpointer(tmp_path)[0].resume() == before


def test_damage_is_told_and_the_one_before_is_used_until_none_is_left(tmp_path: Path) -> None:
    target, _ = checkpointer(tmp_path)
    for step in (1, 2):
        save(target, step)
    for step, resumed in ((2, 1), (1, None)):
        path = tmp_path / f"step_{step:08d}" / "engine" / "weight.pt"
        content = bytearray(path.read_bytes())
        content[100] ^= 4
        path.write_bytes(content)
        again, said = checkpointer(tmp_path)
        if resumed is None:
            with pytest.raises(BadInputError, match=r"none of 2 checkpoint\(s\) is intact"):
                again.resume()
        else:
            state = again.resume()
            assert state is not None
            assert state.step == resumed
        assert said[0].startswith("checkpoint step_00000002 is damaged and not used: engine/weight.pt has another")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": {"dim": 128}}, "belongs to another model: model.dim was 64, is 128"),
        ({"model": {"dim": 64, "act": True}}, "model.act was None, is True"),
        ({"data": {"fingerprint": "b"}}, "data.fingerprint was 'a', is 'b'"),
        ({"topology": {"ranks": 2}}, "resume on the same topology"),
    ],
)
def test_a_resume_with_another_identity_names_the_change(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    save(checkpointer(tmp_path)[0], 1)
    other = replace(IDENTITY, **changed)
    with pytest.raises(BadInputError) as error:
        checkpointer(tmp_path, other)[0].resume()
    assert told in str(error.value)
    part = next(iter(changed))
    if part != "topology":
        assert checkpointer(tmp_path, other, allow_changed=(part,))[0].resume() is not None


def test_the_manifest_names_every_file_but_itself(tmp_path: Path) -> None:
    save(checkpointer(tmp_path)[0], 1)
    folder = tmp_path / "step_00000001"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(files) == found - {MANIFEST}
