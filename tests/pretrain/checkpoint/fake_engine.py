"""A run of one process whose whole training state is two tensors, around the real checkpointer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.environment import Place
from model import IceConfig
from pretrain.checkpoint import MANIFEST, Checkpointer, Fence, RunIdentity, TrainingState
from pretrain.config import CheckpointSection

IDENTITY = RunIdentity(model={"dim": 64}, data={"fingerprint": "a"}, topology={"ranks": 1})
MODEL_CONFIG = IceConfig().scaled_down()


class FakeEngine:
    """What the checkpointer asks of an engine, around one weight and one bias."""

    place = Place(0, 1)
    model_config = MODEL_CONFIG

    def __init__(self) -> None:
        self.weight, self.bias = torch.zeros(3), torch.zeros(2)

    def snapshot(self, folder: Path, tag: str, copy: Callable[[Any], Any] | None) -> dict[str, Any]:
        return {f"{tag}/weight.pt": self.weight if copy is None else copy(self.weight)}

    def load(self, folder: Path, tag: str) -> None:
        self.weight = torch.load(folder / tag / "weight.pt", weights_only=True)

    def selection_biases(self) -> dict[str, Tensor]:
        return {"router.bias": self.bias}

    def plain_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.weight.clone()

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values

    def barrier(self) -> None:
        pass


class Run:
    """A start of the run in ``folder``: a checkpointer that has resumed, and what it said."""

    def __init__(
        self, folder: Path, identity: RunIdentity = IDENTITY, engine: Any = None, resume: bool = True, **section: Any
    ) -> None:
        self.checkpoints = folder / "checkpoints"
        self.said: list[str] = []
        self.engine: Any = engine or FakeEngine()
        self.checkpointer = Checkpointer(
            self.checkpoints,
            CheckpointSection(**{"plain_weights": False, **section}),
            identity,
            self.engine,
            Fence(folder),
            self.said.append,
        )
        self.resumed = self.checkpointer.resume() if resume else None

    def save(self, step: int, wait: bool = True, weight: float | None = None, **state: Any) -> TrainingState:
        """Save a state that is made of ``step``."""
        self.engine.weight.fill_(step if weight is None else weight)
        self.engine.bias.fill_(step / 8)
        saved = TrainingState(step=step, next_sample=10 * step, tokens=100 * step, wandb_id="abc", **state)
        self.checkpointer.save(saved)
        if wait:
            self.checkpointer.wait()
        return saved

    @property
    def folders(self) -> list[str]:
        """Every folder below ``checkpoints/``."""
        return sorted(path.name for path in self.checkpoints.iterdir() if path.is_dir())

    @property
    def steps(self) -> list[int]:
        """The committed ones."""
        return steps_in(self.checkpoints)


def steps_in(checkpoints: Path) -> list[int]:
    return sorted(int(path.parent.name[5:13]) for path in checkpoints.glob(f"step_*/{MANIFEST}"))
