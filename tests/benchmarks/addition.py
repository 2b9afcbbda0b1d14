"""RR-SLM on sums of one to three digits, beside a plain transformer of equal parameters and one of equal FLOPs.

    python tests/benchmarks/addition.py [--steps N] [--ranks 2] [--only addition_rrslm]

Trains ``configs/tasks/addition_*.json`` one after the other through the real command, evaluates each at several depths
by greedy decoding of held-out sums, and prints one table: what was solved by digits, the iterations by digits,
minutes of training, parameters, training FLOPs. A finished run is not trained again; an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402  (after the path)
from rich.table import Table  # noqa: E402

from launch.settings import load_settings  # noqa: E402
from model.parameters import count_parameters, training_flops_per_token  # noqa: E402
from pretrain.config import TrainingConfig  # noqa: E402

NAMES = ("addition_rrslm", "addition_plain_parameters", "addition_plain_flops")
DEPTHS = "1,2,3,5,8"


def main() -> int:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="instead of the configuration's")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=NAMES, action="append")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=value")
    options = parser.parse_args()
    overrides = [*options.overrides, *([f"schedule.steps={options.steps}"] if options.steps else [])]
    rows = [run(name, options.ranks, overrides) for name in options.only or NAMES]
    print_table(rows)
    return 0


def run(name: str, ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Everything known of one configuration after training and evaluating it."""
    path = ROOT / "configs" / "tasks" / f"{name}.json"
    config = load_settings(TrainingConfig, path, overrides)
    threads = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    launcher = str(Path(sys.executable).parent / "deepspeed")
    sets = [part for override in overrides for part in ("--set", override)]
    start = [launcher, "--num_gpus", str(ranks), "--log_level", "error", "pretrain/main.py"]
    subprocess.run([*start, "--config", str(path), *sets], cwd=ROOT, check=True, env=threads)
    depths = DEPTHS if config.mean_loops > 1 else "1"
    folder = ROOT / config.run.path
    evaluate = [sys.executable, "pretrain/evaluate.py", "--run", str(folder), "--loops", depths]
    subprocess.run(evaluate, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    length = config.data.sequence_length
    return {
        "name": name,
        "parameters": count_parameters(config.model).total,
        "flops": training_flops_per_token(config.model, config.mean_loops, context=length) * trained[-1]["tokens"],
        "minutes": sum(line["step_seconds"] for line in trained) / 60,
        "exact_match": json.loads((folder / "evaluation.json").read_text())["exact_match"],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a model and depth."""
    table = Table(title="held-out sums solved (iterations used)")
    difficulties = list(next(iter(rows[0]["exact_match"].values())))
    for column in ("model", "parameters", "training TFLOP", "minutes", "loops", *difficulties):
        table.add_column(column, justify="right")
    for row in rows:
        facts = (row["name"], f"{row['parameters']:,}", f"{row['flops'] / 1e12:.1f}", f"{row['minutes']:.1f}")
        for depth, scores in row["exact_match"].items():
            cells = []
            for name in difficulties:
                used = scores[name]["loops_used"]
                share = f"{scores[name]['solved']}/{scores[name]['problems']} = {scores[name]['accuracy']:.1%}"
                cells.append(share + ("" if used is None else f" ({used:.2f})"))
            table.add_row(*facts, depth, *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
