"""What a fault does to a run on several ranks: numbers that are not finite, spikes, lost and hanging ranks."""

from __future__ import annotations

import pytest
import rank_jobs
import torch
from rank_pool import RankPool
from scenarios import settings

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(500)]

FAULTS = {1: "loss", 2: "infinite_loss", 4: "gradients", 5: "expert"}
BATCHES = 7


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "expert_parallel_size"),
    [(0, "fp32", 2), (0, "bf16", 2), (1, "fp32", 2), (2, "bf16", 1), (3, "fp32", 1), (3, "fp32", 2), (3, "bf16", 2)],
)
def test_steps_with_numbers_that_are_not_finite_on_one_rank_never_were(
    two_ranks: RankPool, zero_stage: int, dtype: str, expert_parallel_size: int
) -> None:
    values = settings(
        optim={"lr": 0.01, "grad_clip": 0.1, "eps": 1e-4},
        precision={"dtype": dtype},
        parallel={"zero_stage": zero_stage, "expert_parallel_size": expert_parallel_size, "micro_batch_size": 2},
    )
    numbers = list(range(BATCHES))
    got = two_ranks.run(rank_jobs.train_with_faults, values=values, numbers=numbers, faults=FAULTS)[0]
    assert got.skipped == list(FAULTS)
    healthy = [number for number in numbers if number not in FAULTS]
    expected = two_ranks.run(rank_jobs.train_with_faults, values=values, numbers=healthy, faults={})[0]
    assert expected.skipped == []
    assert got.losses == expected.losses
    assert got.norms == expected.norms
    for name, weight in expected.weights.items():
        assert torch.equal(got.weights[name], weight), name
