"""Muon through the engine beside Muon written out in one process, and what it must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from pydantic import ValidationError
from rank_pool import RankPool
from scenarios import BASE, Step, reference, settings

from model import IceModel
from pretrain.config import TrainingConfig

pytestmark = pytest.mark.multirank
STEPS = [Step(3), Step(2), Step(4, grad_loops=2)]


def values_of(expert_parallel_size: int, **optim: Any) -> dict[str, Any]:
    muon = {"kind": "muon", "muon_lr": 0.02, "muon_weight_decay": 0.1, **optim}
    return settings(
        model={"n_shared_experts": 1},
        optim=muon,
        parallel={"expert_parallel_size": expert_parallel_size, "micro_batch_size": 2},
    )


@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_muon_on_ranks_is_muon_in_one_process(two_ranks: RankPool, expert_parallel_size: int) -> None:
    values = values_of(expert_parallel_size)
    trace = two_ranks.run(rank_jobs.train, values=values, steps=STEPS)[0]
    expected = reference(values, STEPS)
    assert trace.losses == pytest.approx(expected.losses, rel=1e-4)
    assert trace.norms == pytest.approx(expected.norms, rel=1e-3)
    assert trace.weights.keys() == expected.weights.keys()
    torch.manual_seed(BASE["run"]["seed"])
    start = IceModel(TrainingConfig.model_validate(values).model).state_dict()
    for name, weight in expected.weights.items():
        # Newton-Schulz lifts the smallest singular values to nearly 1, and rounding with them.
        off = (trace.weights[name] - weight).norm() / (weight - start[name]).norm().clamp_min(1e-12)
        assert off < 5e-3, f"{name}: off by {off:.1e} of what it moved"


def test_a_skipped_step_leaves_momenta_alone(two_ranks: RankPool) -> None:
    values = values_of(2)
    clean = two_ranks.run(rank_jobs.train_with_faults, values=values, numbers=[0, 2], faults={})[0]
    hurt = two_ranks.run(rank_jobs.train_with_faults, values=values, numbers=[0, 1, 2], faults={1: "expert"})[0]
    assert hurt.skipped == [1]
    for name, weight in clean.weights.items():
        assert torch.equal(hurt.weights[name], weight), name


def test_a_resumed_run_is_the_one_that_never_stopped(two_ranks: RankPool, tmp_path: Path) -> None:
    values = values_of(2)
    steps = [Step(2), Step(3)]
    whole = two_ranks.run(rank_jobs.save_and_continue, values=values, folder=tmp_path, steps=steps)[0]
    resumed = two_ranks.run(rank_jobs.load_and_continue, values=values, folder=tmp_path, steps=steps)[0]
    assert (resumed.losses, resumed.norms) == (whole.losses, whole.norms)
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"parallel": {"zero_stage": 2}}, "needs parallel.zero_stage = 3, not 2"),
        ({"parallel": {"offload_optimizer": "cpu"}}, "is not used with parallel.offload_optimizer"),
        ({"precision": {"dtype": "fp16"}}, "is not used with precision.dtype = fp16"),
    ],
)
def test_where_muon_cannot_be_used_the_configuration_says_so(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TrainingConfig.model_validate({"data": {"path": "x"}, "model": {}, "optim": {"kind": "muon"}, **section})
