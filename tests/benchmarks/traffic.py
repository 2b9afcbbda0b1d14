"""What a step puts on the wire, by depth: stock ZeRO-3, ours, and the recomputation policies; measured beside the plan.

    OMP_NUM_THREADS=1 python tests/benchmarks/traffic.py [--json FILE]

Two ranks on this machine. "sent" is what rank 0 sends in an optimizer step of one micro-batch by the textbook formulas
of ``pretrain/communication.py``, averaged over the ranks for the expert rows; "plan" is what ``launch/planning`` says
of the same step. "nothing kept" runs ZeRO-3 as a model too large to keep any gathered weight would; "default" leaves
DeepSpeed's settings, under which a model this small keeps all of them.
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

import rank_jobs
from rank_pool import RankPool
from rich.console import Console
from rich.table import Table
from scenarios import settings

from launch.planning.engine_settings import DEFAULTS, NOTHING_KEPT
from launch.planning.run import planned_run
from launch.planning.traffic import bytes_by_kind, step_transfers
from launch.settings import parse_settings
from pretrain.communication import Traffic
from pretrain.config import TrainingConfig

KINDS = ("parameter_gather", "gradient_reduce", "expert_payload", "expert_counts", "other")
BAR = 1.02
EIGHT_BITS = "ours, FP8 dispatch"
# (name, expert-parallel size, remat, leaf, kept, depths)
ROWS = (
    ("stock ZeRO-3, nothing kept", 1, "loop", False, False, (1, 4, 16)),
    ("ours, nothing kept", 1, "loop", True, False, (1, 4, 16, 32)),
    ("stock ZeRO-3, nothing kept", 2, "loop", False, False, (1, 4, 16)),
    ("ours, nothing kept", 2, "loop", True, False, (1, 4, 16, 32)),
    ("ours, default", 2, "loop", True, True, (1, 16)),
    ("ours, remat none", 2, "none", True, False, (16,)),
    ("ours, remat routes", 2, "routes", True, False, (16,)),
    ("ours, remat dispatch", 2, "dispatch", True, False, (16,)),
    ("ours, remat sqrt", 2, "sqrt", True, False, (16,)),
    (EIGHT_BITS, 2, "routes", True, False, (16,)),
)


def main() -> int:
    """Print the table; status 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        pool = RankPool(2, Path(folder))
        for name, size, remat, leaf, kept, depths in ROWS:
            parallel = {"expert_parallel_size": size, "micro_batch_size": 4, "fp8_dispatch": name == EIGHT_BITS}
            values = settings(loop={"remat": remat}, parallel=parallel)
            by_rank = pool.run(
                rank_jobs.traffic_by_depth,
                values=copy.deepcopy(values),
                depths=list(depths),
                leaf=leaf,
                kept=kept,
                timeout_seconds=900,
            )
            config = parse_settings(TrainingConfig, values, "benchmark")
            run = replace(planned_run(config, 2, 4), engine=DEFAULTS if kept else NOTHING_KEPT)
            for depth in depths:
                plan = bytes_by_kind(step_transfers(run, depth)) if leaf else {}
                for kind in KINDS:
                    seen = [rank[depth].get(kind, Traffic()) for rank in by_rank]
                    results.append(
                        {
                            "name": name,
                            "expert_parallel_size": size,
                            "remat": remat,
                            "loops": depth,
                            "kind": kind,
                            "calls": seen[0].calls,
                            "sent_bytes": sum(traffic.sent_bytes for traffic in seen) / 2,
                            "buffer_bytes": sum(traffic.buffer_bytes for traffic in seen) / 2,
                            "planned_sent_bytes": plan.get(kind, (None, None))[0],
                            "planned_buffer_bytes": plan.get(kind, (None, None))[1],
                        }
                    )
        pool.close()
    print_table(results)
    verdicts = bars(results)
    for verdict, passed in verdicts.items():
        print(f"{'pass' if passed else 'FAIL'}  {verdict}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"results": results, "bars": verdicts}, indent=1) + "\n")
    return 0 if all(verdicts.values()) else 1


def print_table(results: list[dict[str, Any]]) -> None:
    """One row a run and depth: KiB sent (and calls) of each kind, and how far the plan's buffers are off at most."""
    table = Table(title="KiB a rank sends in a step (calls), two ranks")
    for column in ("", "EP", "T", *(kind.replace("_", " ") for kind in KINDS), "plan off"):
        table.add_column(column, justify="left" if column == "" else "right")
    rows: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for result in results:
        key = (result["name"], result["expert_parallel_size"], result["loops"])
        rows.setdefault(key, {})[result["kind"]] = result
    for (name, size, depth), by_kind in rows.items():
        cells = [f"{by_kind[kind]['sent_bytes'] / 1024:,.1f} ({by_kind[kind]['calls']})" for kind in KINDS]
        table.add_row(name, str(size), str(depth), *cells, plan_error(list(by_kind.values())))
    Console(width=None if sys.stdout.isatty() else 170).print(table)


def plan_error(results: list[dict[str, Any]]) -> str:
    """The largest relative difference of planned and counted buffers; empty where nothing is planned."""
    errors = [
        abs(result["planned_buffer_bytes"] / result["buffer_bytes"] - 1)
        for result in results
        if result["planned_buffer_bytes"] and result["buffer_bytes"]
    ]
    return f"{max(errors):.2%}" if errors else ""


def bars(results: list[dict[str, Any]]) -> dict[str, bool]:
    """What must hold, and whether it does."""

    def sent(name: str, size: int, loops: int, kind: str, what: str = "sent_bytes") -> float:
        (found,) = (
            result[what]
            for result in results
            if (result["name"], result["expert_parallel_size"], result["loops"], result["kind"])
            == (name, size, loops, kind)
        )
        return float(found)

    ours = "ours, nothing kept"
    verdicts = {}
    for size in (1, 2):
        for kind in ("parameter_gather", "gradient_reduce"):
            ratio = sent(ours, size, 16, kind) / sent(ours, size, 1, kind)
            verdicts[f"EP {size}: {kind} at T = 16 is {ratio:.3f} times T = 1, at most {BAR}"] = ratio <= BAR
    growth = sent(ours, 2, 16, "expert_payload", "buffer_bytes") / sent(ours, 2, 1, "expert_payload", "buffer_bytes")
    verdicts[f"expert_payload's rows at T = 16 are {growth:.3f} times T = 1, at most 16"] = growth <= 16
    none, dispatch = (sent(f"ours, remat {policy}", 2, 16, "expert_payload") for policy in ("none", "dispatch"))
    verdicts["remat = dispatch sends what remat = none does"] = abs(dispatch / none - 1) < 0.01
    planned = [r for r in results if r["planned_buffer_bytes"] and r["buffer_bytes"]]
    worst = max(abs(r["planned_buffer_bytes"] / r["buffer_bytes"] - 1) for r in planned)
    verdicts[f"the plan's bytes are off by {worst:.2%} at most, under 1%"] = worst < 0.01
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
