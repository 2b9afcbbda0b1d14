"""The start of an engine: each rank draws its own experts, and nothing of a layer that is another rank's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import memory_jobs
import pytest
import rank_jobs
import torch
from rank_pool import RankPool
from scenarios import reference, settings

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"expert_parallel_size": 1}),
        (2, {"expert_parallel_size": 1, "zero_init": True}),
        (2, {"expert_parallel_size": 2, "zero_stage": 1}),
        (2, {"expert_parallel_size": 2, "zero_init": True}),
        (4, {"expert_parallel_size": 2, "zero_init": True}),
        (4, {"expert_parallel_size": 4, "zero_init": True}),
    ],
    ids=str,
)
def test_the_initial_weights_are_one_processs_to_the_bit(
    pool_of: Callable[[int], RankPool], ranks: int, parallel: dict[str, Any]
) -> None:
    weights = pool_of(ranks).run(rank_jobs.initial_weights, values=settings(parallel=parallel))[0]
    expected = reference(settings(), []).weights
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_experts_built_in_bf16_are_the_rounded_ones_of_fp32(two_ranks: RankPool) -> None:
    values = settings(parallel={"expert_parallel_size": 2, "zero_init": True}, precision={"dtype": "bf16"})
    weights = two_ranks.run(rank_jobs.initial_weights, values=values)[0]
    expected = reference(settings(), []).weights
    experts = [name for name in expected if ".experts." in name]
    assert len(experts) == 4
    for name in experts:
        assert torch.equal(weights[name], expected[name].bfloat16()), name


def test_a_start_holds_one_layers_own_experts_and_gathers_none(two_ranks: RankPool) -> None:
    experts, layers, dim, hidden = 16, 3, 128, 256
    model = {"dim": dim, "n_experts": experts, "expert_dim": hidden, "recurrent_layers": layers}
    values = settings(model=model, parallel={"expert_parallel_size": 2, "zero_init": True})
    two_ranks.run(memory_jobs.cost_of_a_start, values=settings(parallel={"zero_init": True}))  # its first imports
    whole = 4 * 3 * experts * hidden * dim  # bytes of a layer's experts
    own, shards = whole // 2, layers * whole // 2
    for cost in two_ranks.run(memory_jobs.cost_of_a_start, values=values):
        print(cost, whole, own, shards)
        assert cost.gathered < 0.02 * whole  # the routers
    for cost in two_ranks.run(memory_jobs.cost_of_a_start, values=values, stock=True):
        print(cost)
        assert cost.gathered > layers * whole
