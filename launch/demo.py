"""``make demo``: raw text to a trained, evaluated, talking model on two processes of this machine.

Each part is the command a user would type; this only runs them in order, skips what is done, and gathers their numbers
in a closing table. An interrupted demo goes on from the last checkpoint when it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from launch.environment import name_accelerator
from launch.settings import EXIT_FINISHED, exit_with_status, load_settings

if TYPE_CHECKING:
    from pretrain.config import TrainingConfig

ROOT = Path(__file__).resolve().parent.parent
DATA_CONFIG = "configs/data/demo.json"
RUN_CONFIG = "configs/ice_tiny.json"
RANKS = 2
PROMPT = "It was the opinion of"
SAMPLE_TOKENS = 120
INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    """Prepare, train, evaluate, generate, and say what came of it."""
    parser = argparse.ArgumentParser(description="The demo: text to a trained model on two processes.")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="overrides", help="override a run setting"
    )
    return run_demo(parser.parse_args(arguments).overrides)


def run_demo(overrides: Sequence[str]) -> int:
    """The demo with ``overrides`` of ``configs/ice_tiny.json``; returns the exit status."""
    from pretrain.config import TrainingConfig

    os.chdir(ROOT)
    name_accelerator()
    started = time.monotonic()
    console = Console(soft_wrap=True, highlight=False)
    config = load_settings(TrainingConfig, ROOT / RUN_CONFIG, overrides)
    run = str(config.run.path)
    cores = os.cpu_count() or 1
    console.rule("1/4  text to token shards", align="left")
    status = _run([sys.executable, "data_pipeline/main.py", "--config", DATA_CONFIG])
    if status == EXIT_FINISHED:
        console.rule("2/4  training on two ranks: ZeRO-3, expert parallelism", align="left")
        if is_trained(config):
            console.print(f"{run}: already trained; remove that folder to train again")
        else:
            status = _run(training_command(overrides), threads=max(1, cores // RANKS))
    if status == EXIT_FINISHED:
        console.rule("3/4  evaluation by loop depth", align="left")
        status = _run([sys.executable, "pretrain/evaluate.py", "--run", run], threads=cores)
    if status == EXIT_FINISHED:
        console.rule("4/4  a sample", align="left")
        status = _print_sample(console, run)
    if status != EXIT_FINISHED:
        console.print(f"the demo stopped with status {status}; the same command goes on from where it was")
        return status
    _print_summary(console, config)
    console.print(f"took {(time.monotonic() - started) / 60:.1f} minutes, set-up not counted")
    return EXIT_FINISHED


def training_command(overrides: Sequence[str]) -> list[str]:
    """What a user types to train the demo's model."""
    launcher = str(Path(sys.executable).parent / "deepspeed")
    command = [launcher, "--num_gpus", str(RANKS), "--log_level", "error", "pretrain/main.py", "--config", RUN_CONFIG]
    for override in overrides:
        command += ["--set", override]
    return command


def is_trained(config: TrainingConfig) -> bool:
    """Whether the run directory holds the last checkpoint of exactly this configuration."""
    from pretrain.checkpoint import MANIFEST, step_folder_name

    record = config.run.path / "config.json"
    last = config.run.path / "checkpoints" / step_folder_name(config.schedule.steps) / MANIFEST
    if not (last.is_file() and record.is_file()):
        return False
    return bool(json.loads(record.read_text()) == config.model_dump(mode="json"))


def _environment(threads: int) -> dict[str, str]:
    """The tools of ``.venv`` are found without activating it; ranks share the cores evenly."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": str(threads)}


def _run(command: list[str], threads: int = 1) -> int:
    """Run one part; its output is the user's, and Ctrl-C reaches it first."""
    process = subprocess.Popen(command, cwd=ROOT, env=_environment(threads))
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return INTERRUPTED


def _print_sample(console: Console, run: str) -> int:
    command = [sys.executable, "pretrain/generate.py", "--run", run, "--prompt", PROMPT]
    command += ["--max-new-tokens", str(SAMPLE_TOKENS), "--temperature", "0.7", "--top-p", "0.9"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(1), stdout=subprocess.PIPE, text=True)
    if done.returncode == EXIT_FINISHED:
        console.print(Panel(Text(done.stdout.strip()), title=f'continuing "{PROMPT}"'))
    return done.returncode


def _print_summary(console: Console, config: TrainingConfig) -> None:
    from data_pipeline.dataset.reader import open_dataset
    from model.parameters import count_parameters
    from pretrain.evaluate import gzip9_bits_per_byte

    run = config.run.path
    count = count_parameters(config.model, config.mean_loops)
    by_loops = json.loads((run / "evaluation.json").read_text())["by_loops"]
    tokens = config.schedule.steps * config.data.global_batch_size * config.data.sequence_length
    notes = {1: " (no recurrence)", config.mean_loops: " (trained mean)", 2 * config.mean_loops: " (twice that)"}
    table = Table(title="Ice demo", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters, total", f"{count.total:,}")
    table.add_row("parameters, active a token", f"{count.active:,}")
    table.add_row("tokens seen", f"{tokens:,}")
    table.add_section()
    for depth, result in sorted((int(depth), result) for depth, result in by_loops.items()):
        loops = "loop" if depth == 1 else "loops"
        table.add_row(
            f"held-out bits a byte at {depth} {loops}{notes.get(depth, '')}", f"{result['bits_per_byte']:.3f}"
        )
    reference = gzip9_bits_per_byte(open_dataset(config.data.path))
    table.add_row("gzip -9 on the same text", f"{reference:.3f}")
    console.print(table)
    for name, path in {
        "loss plot": run / "plots" / "loss.png",
        "depth plot": run / "plots" / "depth.png",
        "expert load": run / "plots" / "expert_load.png",
        "run directory": run,
    }.items():
        console.print(f"{name:14} {path}")


if __name__ == "__main__":
    exit_with_status(main)
