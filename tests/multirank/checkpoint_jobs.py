"""Jobs of the checkpointer on real engines, for a :class:`rank_pool.RankPool`."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rank_jobs import end_engine, start_engine, train_on
from scenarios import Step, Trace

from launch.environment import discover_place
from launch.files import sha256_of, write_json_atomically
from pretrain.checkpoint import MANIFEST, Checkpointer, Fence, RunIdentity, TrainingState
from pretrain.checkpoint import share as share_module
from pretrain.engine import TrainingEngine

IDENTITY = RunIdentity(model={}, data={}, topology={})


def open_run(engine: TrainingEngine, run: Path) -> tuple[Checkpointer, list[str]]:
    """A checkpointer of the run directory ``run``, not yet resumed, and what it says."""
    said: list[str] = []
    fence = Fence(run)
    return Checkpointer(run / "checkpoints", engine.config.checkpoint, IDENTITY, engine, fence, said.append), said


def state_of(step: int) -> TrainingState:
    """A state with only a step."""
    return TrainingState(step=step, next_sample=step, tokens=step, wandb_id=None)


def save_behind_training(values: dict[str, Any], run: Path, steps: list[Step]) -> tuple[Trace, list[int]]:
    """Save in the middle of ``steps``; the last rank's write is held until all of them are trained.

    Returns what was trained after the save, and which steps were committed before and after the write was let go.
    """
    engine = start_engine(values)
    checkpointer, said = open_run(engine, run)
    assert checkpointer.resume() is None
    half = len(steps) // 2
    train_on(engine, steps[:half])
    let_go = threading.Event()
    original = share_module.HashedFile

    def held(*arguments: Any) -> Any:
        assert let_go.wait(100)
        return original(*arguments)

    with mock.patch.object(share_module, "HashedFile", held):
        checkpointer.save(state_of(half))
        trace = Trace()
        for number, step in enumerate(steps[half:], start=half):
            part = train_on(engine, [step], first_step=number)
            trace.losses += part.losses
            trace.norms += part.norms
            trace.weights = part.weights
            checkpointer.poll()
        engine.barrier()
        before = len(list((run / "checkpoints").glob(f"step_*/{MANIFEST}")))
        let_go.set()
        assert checkpointer.wait()
    assert said == []
    end_engine(engine)
    return trace, [before, len(list((run / "checkpoints").glob(f"step_*/{MANIFEST}")))]


def resume_and_train(values: dict[str, Any], run: Path, steps: list[Step]) -> Trace:
    """A new engine, started from other weights, resumes and trains the second half of ``steps``."""
    engine = start_engine({**values, "run": {"seed": 99}})
    checkpointer, _ = open_run(engine, run)
    state = checkpointer.resume()
    assert state is not None
    trace = train_on(engine, steps[state.step :], first_step=state.step)
    end_engine(engine)
    return trace


def fail_on_one_rank(values: dict[str, Any], run: Path) -> tuple[list[str], list[bool], str]:
    """What all ranks are told when only the last one's disk is full; then a save that works, and a new start's."""
    engine = start_engine(values)
    checkpointer, said = open_run(engine, run)
    checkpointer.resume()
    outcomes = []

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    last = engine.place.rank == engine.place.world_size - 1
    for step in (1, 2):
        with mock.patch.object(share_module, "HashedFile", full if last and step == 1 else share_module.HashedFile):
            checkpointer.save(state_of(step))
            outcomes.append(checkpointer.wait())
    later, _ = open_run(engine, run)
    later.resume()
    try:
        checkpointer.save(state_of(3))
        checkpointer.wait()
        stale = "committed"
    except Exception as error:
        stale = f"{type(error).__name__}: {error}"
    end_engine(engine)
    return said, outcomes, stale


class Malicious:
    """Unpickling it without restriction makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def refuse_malicious_files(values: dict[str, Any], run: Path, mark: Path) -> dict[str, str]:
    """What a resume says when one file after the other of a real checkpoint asks for code."""
    engine = start_engine(values)
    checkpointer, _ = open_run(engine, run)
    checkpointer.resume()
    checkpointer.save(state_of(1))
    checkpointer.wait()
    checkpoint = run / "checkpoints" / "step_00000001"
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.pt"))
    answers = {}
    for name in names:
        path = checkpoint / name
        whole, manifest = path.read_bytes(), (checkpoint / MANIFEST).read_bytes()
        engine.barrier()
        if engine.place.is_first:
            state = torch.load(path, weights_only=True)
            torch.save({**state, "extra": Malicious(mark)}, path)
            changed = json.loads(manifest)
            changed["files"][name] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
            write_json_atomically(checkpoint / MANIFEST, changed)
        engine.barrier()
        try:
            checkpointer.resume()
            answers[name] = "loaded"
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        engine.barrier()
        if engine.place.is_first:
            path.write_bytes(whole)
            (checkpoint / MANIFEST).write_bytes(manifest)
        engine.barrier()
    assert checkpointer.resume() is not None
    end_engine(engine)
    return answers


def load_malicious_file_by_the_engine(values: dict[str, Any], run: Path, mark: Path) -> str:
    """The engine's own load of such a file, as if nothing had looked at it before; on one rank."""
    engine = start_engine(values)
    path = run / f"made_up_{discover_place().rank}.pt"
    torch.save({"extra": Malicious(mark)}, path)
    try:
        engine._engine.checkpoint_engine.load(str(path))
        answer = "loaded"
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    end_engine(engine)
    return answer
