"""Weights of a real engine's checkpoints, put together without it, and an engine that starts from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import interchange_jobs
import pytest
import torch
from rank_pool import RankPool
from scenarios import Step, settings
from torch import Tensor

from launch.files import sha256_of
from launch.settings import parse_settings
from model.expert_parallel import SELECTION_BIAS
from pretrain.checkpoint import RunIdentity, TrainingState
from pretrain.checkpoint.hashed_file import FileEntry
from pretrain.checkpoint.layout import BIASES, ENGINE, STATE
from pretrain.checkpoint.manifest import write_manifest
from pretrain.checkpoint.state import encode_state
from pretrain.checkpoint.universal import make_universal
from pretrain.config import TrainingConfig
from pretrain.interchange.weight_source import WeightSource, open_checkpoint
from pretrain.weights import safetensors_file

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]

STEPS = [Step(2), Step(3)]


def values_of(expert_parallel_size: int, zero_stage: int = 3, **changes: dict[str, Any]) -> dict[str, Any]:
    # Two recurrent layers, and sizes that no number of ranks divides: every parameter is padded somewhere.
    model = {"vocab_size": 96, "tie_embeddings": False, "prelude_layers": 1}
    parallel = {"expert_parallel_size": expert_parallel_size, "zero_stage": zero_stage}
    return settings(model=model, parallel=parallel, **changes)


def as_checkpoint(folder: Path, values: dict[str, Any], ranks: int, weights: dict[str, Tensor]) -> Path:
    """The engine's files in ``folder`` as a run's checkpoint without plain weights."""
    config = parse_settings(TrainingConfig, values, "scenario")
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (folder / "saved").rename(checkpoint / ENGINE)
    biases = {name: tensor for name, tensor in weights.items() if name.endswith(SELECTION_BIAS)}
    with (checkpoint / BIASES).open("wb") as file:
        safetensors_file(biases)(file)
    topology = {"ranks": ranks, "zero_stage": config.parallel.zero_stage, "dtype": "fp32"}
    identity = RunIdentity(config.model.model_dump(mode="json"), {}, topology)
    (checkpoint / STATE).write_bytes(encode_state(TrainingState(2, 16, 256, None), identity))
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    write_manifest(
        checkpoint,
        {str(path.relative_to(checkpoint)): FileEntry(sha256_of(path), path.stat().st_size) for path in files},
    )
    return checkpoint


def assert_same(source: WeightSource, weights: dict[str, Tensor], case: str) -> None:
    assert source.tensors.keys() == weights.keys(), case
    for name, expected in weights.items():
        got = torch.empty(expected.shape)
        source.tensors[name].copy_to(got)
        assert torch.equal(got, expected), f"{case}: {name}"


def test_weights_are_put_together_from_any_ranks_and_started_from(
    pool_of: Callable[[int], RankPool], tmp_path: Path
) -> None:
    checkpoint, weights = Path(), {}
    for ranks, size, zero_stage in ((2, 2, 3), (2, 1, 2), (4, 2, 3)):
        case = f"{ranks} ranks, EP={size}, ZeRO-{zero_stage}"
        values, folder = values_of(size, zero_stage), tmp_path / case
        weights = pool_of(ranks).run(interchange_jobs.save_and_gather, values=values, folder=folder, steps=STEPS)[0]
        checkpoint = as_checkpoint(folder, values, ranks, weights)
        if zero_stage == 3:
            assert_same(open_checkpoint(checkpoint, "sharded"), weights, case)
        if ranks == 2:
            make_universal(checkpoint)
            assert_same(open_checkpoint(checkpoint, "universal"), weights, f"{case}, universal")
    # From four ranks' files, on two: every bit is there, however experts are spread, and training goes the same way.
    losses = []
    for size, zero_stage in ((1, 3), (2, 3), (2, 1)):
        values = {**values_of(size, zero_stage), "run": {"seed": 99}}
        got, trace = pool_of(2).run(interchange_jobs.start_from, values=values, path=checkpoint, steps=STEPS)[0]
        assert got.keys() == weights.keys()
        for name, tensor in weights.items():
            assert torch.equal(got[name], tensor), f"EP={size}, ZeRO-{zero_stage}: {name}"
        losses.append(trace)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
