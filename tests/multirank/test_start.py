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

from launch.planning.memory import plan_memory
from launch.planning.run import planned_run
from launch.settings import parse_settings
from pretrain.config import TrainingConfig

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
    """And the plan knows it; what AutoEP does by itself is measured beside it."""
    experts, layers, dim, hidden = 16, 3, 128, 256
    model = {"dim": dim, "n_experts": experts, "expert_dim": hidden, "recurrent_layers": layers}
    values = settings(model=model, parallel={"expert_parallel_size": 2, "zero_init": True})
    two_ranks.run(memory_jobs.cost_of_a_start, values=settings(parallel={"zero_init": True}))  # its first imports
    ours = two_ranks.run(memory_jobs.cost_of_a_start, values=values)
    stock = two_ranks.run(memory_jobs.cost_of_a_start, values=values, stock=True)
    config = parse_settings(TrainingConfig, values, "scenario")
    planned = plan_memory(planned_run(config, 2, 4), on_gpu=False).start_bytes
    whole = 4 * 3 * experts * hidden * dim  # bytes of a layer's experts
    for cost, stock_cost in zip(ours, stock, strict=True):
        assert cost.gathered < 0.01 * whole  # the routers
        assert cost.peak == pytest.approx(planned, rel=0.1)
        assert stock_cost.gathered > layers * whole
        assert stock_cost.peak > 2 * cost.peak
