"""Traffic flat in depth, and the plan's bytes beside those that go over the wire."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import rank_jobs
from rank_pool import RankPool
from scenarios import BATCH, LENGTH, settings

from launch.planning.engine_settings import DEFAULTS, NOTHING_KEPT
from launch.planning.run import planned_run
from launch.planning.traffic import bytes_by_kind, step_transfers
from launch.settings import parse_settings
from pretrain.communication import CollectiveKind, Traffic
from pretrain.config import TrainingConfig

pytestmark = pytest.mark.multirank
DEPTHS = [1, 5]
ROWS = BATCH * LENGTH * 2  # of both ranks: 2 experts a token
LAYERS, WIDTH, FLOAT = 2, 32, 4


def values_of(remat: str, expert_parallel_size: int, zero_stage: int = 3) -> dict[str, Any]:
    parallel = {"expert_parallel_size": expert_parallel_size, "micro_batch_size": 2, "zero_stage": zero_stage}
    return settings(loop={"remat": remat}, parallel=parallel)


def assert_planned(
    values: dict[str, Any], by_rank: list[dict[int, dict[CollectiveKind, Traffic]]], kept: bool = False
) -> None:
    """Buffers to one percent of the plan's; rows are dealt unevenly to ranks, so over both of them."""
    config = parse_settings(TrainingConfig, values, "scenario")
    run = replace(planned_run(config, 2, FLOAT), engine=DEFAULTS if kept else NOTHING_KEPT)
    for depth in by_rank[0]:
        planned = bytes_by_kind(step_transfers(run, depth))
        for kind in ("parameter_gather", "gradient_reduce", "expert_payload", "expert_counts"):
            counted = sum(rank[depth].get(kind, Traffic()).buffer_bytes for rank in by_rank) / 2
            assert counted == pytest.approx(planned.get(kind, (0, 0))[1], rel=0.01), (depth, kind)


def test_parameter_traffic_is_flat_in_depth_and_expert_traffic_is_the_routed_rows(two_ranks: RankPool) -> None:
    values = values_of("loop", 2)
    by_rank = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=DEPTHS)
    shallow, deep = (by_rank[0][depth] for depth in DEPTHS)
    for kind in ("parameter_gather", "gradient_reduce"):
        assert deep[kind] == shallow[kind]  # the bar is 1.02
    for depth in DEPTHS:
        # Dispatch and combine: forward, recomputed, and backward.
        both = sum(rank[depth]["expert_payload"].buffer_bytes for rank in by_rank)
        assert both == 6 * depth * LAYERS * ROWS * WIDTH * FLOAT
    assert_planned(values, by_rank)


@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_muons_gathers_are_the_planned_ones(two_ranks: RankPool, expert_parallel_size: int) -> None:
    values = values_of("loop", expert_parallel_size)
    values["optim"]["kind"] = "muon"
    by_rank = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=DEPTHS[:1])
    assert_planned(values, by_rank)


def test_stock_zero_gathers_in_every_loop(two_ranks: RankPool) -> None:
    """Fact 3: what the leaf is for."""
    values = values_of("loop", 1)
    ours = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=DEPTHS)
    assert ours[0][1] == ours[0][5]
    assert_planned(values, ours)
    (stock, _) = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=DEPTHS, leaf=False)
    assert stock[5]["parameter_gather"].sent_bytes > 2 * stock[1]["parameter_gather"].sent_bytes
    assert stock[5]["parameter_gather"].sent_bytes > 2 * ours[0][5]["parameter_gather"].sent_bytes


# Of 4 loops. sqrt runs each again, and the first of the first of its two segments once more.
@pytest.mark.parametrize(
    ("remat", "eight_bits", "payloads", "plans"),
    [("routes", False, 24, 4), ("routes", True, 24, 4), ("dispatch", True, 16, 4), ("sqrt", False, 26, 9)],
)
def test_recomputation_sends_what_its_policy_did_not_keep(
    two_ranks: RankPool, remat: str, eight_bits: bool, payloads: int, plans: int
) -> None:
    values = values_of(remat, 2)
    values["parallel"]["fp8_dispatch"] = eight_bits
    by_rank = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=[4], kept=True)
    micro_batches = 2
    assert by_rank[0][4]["expert_payload"].calls == payloads * LAYERS * micro_batches
    assert by_rank[0][4]["expert_counts"].calls == plans * LAYERS * micro_batches
    assert_planned(values, by_rank, kept=True)
