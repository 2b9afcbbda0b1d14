"""The plan's peak memory beside the measured one, on two ranks of this machine.

    OMP_NUM_THREADS=1 python tests/benchmarks/plan_memory.py [--json FILE] [--only NAME]...

Each row is an engine of 200 to 650 MB a rank, measured in the third step by ``tests/multirank/memory_jobs.py``
(bytes in use after every operation). A CPU has no caching allocator and no second memory: the plan's allowance is zero
and what it puts in host memory is added. The gradients' bucket, 500 million numbers by default, is set to 5 million.
Routing deals rows unevenly, so ranks differ; the plan is for even dealing and is compared with their mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "multirank"))  # run as a script
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import memory_jobs
from rank_pool import RankPool
from rich.console import Console
from rich.table import Table

from launch.planning.engine_settings import EngineSettings
from launch.planning.memory import MemoryPlan, plan_memory
from launch.planning.run import planned_run
from launch.settings import parse_settings
from pretrain.config import TrainingConfig

BAR = 0.10
BUCKET = 5_000_000
BASE: dict[str, Any] = {
    "run": {"seed": 7},
    "model": {
        "vocab_size": 4096,
        "dim": 512,
        "max_seq_len": 1024,
        "max_output_tokens": 64,
        "prelude_layers": 1,
        "recurrent_layers": 1,
        "coda_layers": 1,
        "max_loop_iters": 4,
        "n_heads": 8,
        "n_kv_heads": 4,
        "ffn_dim": 1408,
        "n_experts": 16,
        "n_shared_experts": 1,
        "n_experts_per_tok": 2,
        "expert_dim": 512,
    },
    "data": {"path": "unused", "sequence_length": 512, "global_batch_size": 4},
    "optim": {"lr": 1e-3},
    "schedule": {"steps": 10, "warmup_steps": 0},
    "loop": {"remat": "loop", "mean_loops": 4},
    "precision": {"dtype": "fp32"},
    "parallel": {"zero_stage": 3, "expert_parallel_size": 2, "micro_batch_size": 2},
}
MLA = {
    "attn_type": "mla",
    "q_lora_rank": 192,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "ZeRO-3, EP 2, 4 loops": {},
    "nothing recomputed, 8 loops": {
        "loop": {"remat": "none", "mean_loops": 8},
        "data": {"global_batch_size": 2},
        "parallel": {"micro_batch_size": 1},
    },
    "EP 1": {"parallel": {"expert_parallel_size": 1}},
    "ZeRO-2": {"parallel": {"zero_stage": 2}},
    "ZeRO-1, 8 loops": {"parallel": {"zero_stage": 1}, "loop": {"mean_loops": 8}},
    "no ZeRO": {"parallel": {"zero_stage": 0}},
    "16 loops, 4 x 256 tokens": {
        "data": {"sequence_length": 256, "global_batch_size": 8},
        "parallel": {"micro_batch_size": 4},
        "loop": {"mean_loops": 16},
    },
    "16 loops, sqrt": {"loop": {"mean_loops": 16, "remat": "sqrt"}},
    "16 loops, dispatch kept": {"loop": {"mean_loops": 16, "remat": "dispatch"}},
    "mla, 1,024 tokens": {
        "model": MLA,
        "data": {"sequence_length": 1024, "global_batch_size": 2},
        "parallel": {"micro_batch_size": 1},
    },
    "two scales, 2 gradient loops": {"model": {"msrd_scales": (1, 2)}, "loop": {"grad_loops": 2}},
    "bf16, 2 loops, 2 x 128 tokens": {
        "precision": {"dtype": "bf16"},
        "loop": {"mean_loops": 2},
        "data": {"sequence_length": 128},
    },
    "optimizer in host memory": {"parallel": {"offload_optimizer": "cpu"}},
    "optimizer and parameters in host memory": {"parallel": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}},
}
WARM_UP = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "expert_dim": 32, "ffn_dim": 64, "vocab_size": 256}


def values_of(changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings of a row."""
    values = copy.deepcopy(BASE)
    for section, keys in changes.items():
        values[section].update(keys)
    return values


def planned(values: dict[str, Any]) -> MemoryPlan:
    """What the plan says of it."""
    config = parse_settings(TrainingConfig, values, "benchmark")
    dtype_bytes = 2 if config.precision.dtype == "bf16" else 4
    run = planned_run(config, ranks=2, dtype_bytes=dtype_bytes)
    return plan_memory(replace(run, engine=EngineSettings(reduce_bucket_size=BUCKET)), on_gpu=False)


def measured(pool: RankPool, values: dict[str, Any]) -> list[memory_jobs.MemoryPeaks]:
    """Each rank's peaks."""
    config = parse_settings(TrainingConfig, values, "benchmark")
    peaks: list[memory_jobs.MemoryPeaks] = pool.run(
        memory_jobs.memory_of_a_step,
        values=values,
        loops=config.mean_loops,
        zero_settings={"reduce_bucket_size": BUCKET},
        timeout_seconds=900,
    )
    return peaks


def main() -> int:
    """Print the table; status 1 when a row is off by more than the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", action="append", choices=CASES, metavar="NAME")
    arguments = parser.parse_args()
    table = Table(title="MiB a rank, two ranks")
    for column in ("", "plan", "measured", "plan / measured", "fullest (plan)", "between, forward, backward, step"):
        table.add_column(column, justify="left" if column == "" else "right")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(2, Path(folder))
        measured(pool, values_of({"model": WARM_UP}))  # imports what the first engine of a process imports
        for name in arguments.only or CASES:
            values = values_of(CASES[name])
            plan, ranks = planned(values), measured(pool, values)
            means = [sum(column) / len(ranks) / 2**20 for column in zip(*ranks, strict=True)]
            peak = sum(rank.peak for rank in ranks) / len(ranks)
            total = plan.total + plan.host_bytes
            moments = ", ".join(f"{mean:.0f}" for mean in means)
            table.add_row(
                name, f"{total / 2**20:.0f}", f"{peak / 2**20:.0f}", f"{total / peak:.3f}", plan.moment, moments
            )
            results.append(
                {
                    "name": name,
                    "planned_bytes": total,
                    "planned_moments": plan.moments,
                    "measured_bytes_of_ranks": [rank._asdict() for rank in ranks],
                    "ratio": total / peak,
                }
            )
            print(f"{name}: {total / peak:.3f}", file=sys.stderr, flush=True)
        pool.close()
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    missed = [result["name"] for result in results if abs(result["ratio"] - 1) > BAR]
    print(f"{'pass' if not missed else 'FAIL'}  within {BAR:.0%} of measured: {len(results) - len(missed)} rows")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
