"""The plan's peak memory beside a real engine's; ``tests/benchmarks/plan_memory.py`` does it for a dozen settings."""

from __future__ import annotations

from dataclasses import replace

import memory_jobs
import pytest
from rank_pool import RankPool
from scenarios import settings

from launch.planning.engine_settings import EngineSettings
from launch.planning.memory import plan_memory
from launch.planning.run import planned_run
from launch.settings import parse_settings
from pretrain.config import TrainingConfig

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_planned_peak_is_the_measured_one_to_ten_percent(two_ranks: RankPool, optimizer: str) -> None:
    sizes = {"dim": 256, "n_heads": 4, "vocab_size": 2048, "ffn_dim": 704, "expert_dim": 256, "max_seq_len": 256}
    values = settings(
        model=sizes | {"n_experts": 16, "tie_embeddings": False, "recurrent_layers": 1},
        data={"sequence_length": 256},
        optim={"kind": optimizer},
        loop={"remat": "loop", "mean_loops": 4},
        parallel={"expert_parallel_size": 2, "micro_batch_size": 4},
    )
    bucket = 1_000_000
    zero = {"reduce_bucket_size": bucket}
    small = settings(optim={"kind": optimizer}, parallel={"expert_parallel_size": 2, "micro_batch_size": 4})
    two_ranks.run(memory_jobs.memory_of_a_step, values=small, loops=2, zero_settings=zero)  # its first imports
    ranks = two_ranks.run(memory_jobs.memory_of_a_step, values=values, loops=4, zero_settings=zero)
    measured = sum(rank.peak for rank in ranks) / len(ranks)
    config = parse_settings(TrainingConfig, values, "scenario")
    run = replace(planned_run(config, 2, 4), engine=EngineSettings(reduce_bucket_size=bucket))
    assert plan_memory(run, on_gpu=False).total == pytest.approx(measured, rel=0.1)
