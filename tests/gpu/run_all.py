"""Everything that waits for a GPU, on one GPU, in some twenty minutes, as one table.

    tests/gpu/run_all.sh [--device cuda] [--json FILE] [--only NAME]...

First the checks of ``checks.py``, each in a process of its own with a time limit, so that a crash or a hang of one says
so in its row and the others go on. Then a training run by its real command (``pretrain/main.py`` under ``deepspeed``,
one rank, bf16, the demo's data): thirty steps, cut after fifteen and resumed, whose losses must equal those of an
undisturbed run to the bit. Status 0 when all is as it must be, 1 when not, 78 without the device.

``--device cpu`` runs the same, tiny, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
from checks import CHECKS, REAL, TINY  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

CHECK_SECONDS = 240
TRAINING_SECONDS = 420
STEPS = 30


def main(arguments: list[str] | None = None) -> int:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Everything that waits for a GPU, as one table.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--only", action="append", help="these rows only; may be given several times")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "demo", help="the demo's data set (make data)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device that torch sees: a CPU build of torch, or no GPU; --device cpu tries the script itself")
        return 78
    rows = []
    for check in CHECKS:
        if not options.only or check.__name__ in options.only:
            rows.append(in_a_process(check.__name__, options.device))
            print(f"{rows[-1]['check']}: {rows[-1]['outcome']}", file=sys.stderr, flush=True)
    if not options.only or "training" in options.only:
        rows.append(training(options.device, options.data))
    table = Table(title=f"checks on {options.device}", show_lines=True)
    for column in ("check", "outcome", "seconds", "figures"):
        table.add_column(column, overflow="fold", justify="right" if column == "seconds" else "left")
    for row in rows:
        figures = "\n".join(
            f"{name}: {value:.2e}" if isinstance(value, float) and 0 < abs(value) < 1e-2 else f"{name}: {value}"
            for name, value in row["figures"].items()
        )
        table.add_row(row["check"].replace("_", " "), row["outcome"], f"{row['seconds']:.0f}", figures)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["outcome"] == "as it must be" for row in rows) else 1


def in_a_process(name: str, device: str) -> dict[str, Any]:
    """A row of the table; the process is ended when its time is over."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    process = context.Process(target=_run, args=(name, device, answers))
    started = time.monotonic()
    process.start()
    outcome: str = f"no answer in {CHECK_SECONDS} s"
    figures: dict[str, Any] = {}
    while time.monotonic() - started < CHECK_SECONDS:
        try:
            outcome, figures = answers.get(timeout=1)
            break
        except queue.Empty:
            if not process.is_alive():
                outcome = f"ended with status {process.exitcode}"
                break
    process.join(timeout=10)
    if process.is_alive():
        process.kill()
    return {"check": name, "outcome": outcome, "seconds": time.monotonic() - started, "figures": figures}


def _run(name: str, device: str, answers: Any) -> None:
    check = next(check for check in CHECKS if check.__name__ == name)
    try:
        answers.put(("as it must be", check(torch.device(device), REAL if device == "cuda" else TINY)))
    except AssertionError as error:
        answers.put((f"OFF: {error}", {}))
    except Exception:
        answers.put((f"FAILED: {traceback.format_exc(limit=-3)}", {}))


def training(device: str, data: Path) -> dict[str, Any]:
    """The real command on one rank, stopped and resumed, beside an undisturbed run."""
    started = time.monotonic()
    row: dict[str, Any] = {"check": "training", "outcome": "as it must be", "figures": {}}
    with tempfile.TemporaryDirectory(prefix="ice-gpu-") as folder:
        runs = Path(folder)
        for name, steps in (("undisturbed", STEPS), ("resumed", STEPS // 2), ("resumed", STEPS)):
            status, output = _train(device, data, runs, name, steps)
            if status != 0:
                row["outcome"] = f"{name}: status {status}: {output[-1500:]}"
                break
        else:
            losses = [_losses(runs / name / "metrics.jsonl") for name in ("undisturbed", "resumed")]
            row["figures"] = {"first loss": losses[0][0], "last loss": losses[0][-1]}
            if losses[0] != losses[1]:
                row["outcome"] = f"OFF: resumed {losses[1][-3:]}, undisturbed {losses[0][-3:]}"
            elif not losses[0][-1] < losses[0][0]:
                row["outcome"] = f"OFF: the loss does not fall: {losses[0][0]} to {losses[0][-1]}"
    return row | {"seconds": time.monotonic() - started}


def _losses(metrics: Path) -> list[float]:
    """Of every step; evaluations have lines of their own."""
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def _train(device: str, data: Path, runs: Path, name: str, steps: int) -> tuple[int, str]:
    # The whole schedule's length stays the same, so that the first half is the undisturbed run's.
    changes = {
        "run.dir": runs,
        "run.name": name,
        "data.path": data,
        "schedule.kind": "constant",
        "schedule.steps": steps,
        "schedule.warmup_steps": 2,
        "checkpoint.every": STEPS // 2,
        "eval.every": STEPS,
        "parallel.expert_parallel_size": 1,
        "parallel.loss_chunk_tokens": 1024,
        "loop.remat": "routes",
        "logging.wandb": "disabled",
    }
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1", str(ROOT / "pretrain" / "main.py")]
    command += ["--config", str(ROOT / "configs" / "ice_tiny.json")]
    for key, value in changes.items():
        command += ["--set", f"{key}={value}"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"DS_ACCELERATOR": device},
            capture_output=True,
            text=True,
            timeout=TRAINING_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return -1, str(error)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
