"""``make demo``: raw text to a trained, evaluated, talking model on two processes of this machine.

Each part is the command a user would type; this only runs them in order, skips what is done, and gathers their numbers
in a closing table. An interrupted demo goes on from the last checkpoint when it is started again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from launch.settings import EXIT_FAILED, EXIT_FINISHED, load_settings

ROOT = Path(__file__).resolve().parent.parent
DATA_CONFIG = "configs/data/demo.json"
RUN_CONFIG = "configs/ice_tiny.json"
RANKS = 2
PROMPT = "It was the opinion of"
SAMPLE_TOKENS = 100


def main() -> int:
    """Prepare, train, evaluate, generate, and say what came of it."""
    os.chdir(ROOT)
    started = time.monotonic()
    console = Console(soft_wrap=True, highlight=False)
    for title, command in (
        ("1/4  text to token shards", [sys.executable, "data_pipeline/main.py", "--config", DATA_CONFIG]),
        ("2/4  training on two ranks: ZeRO-3, expert parallelism", _training_command()),
        ("3/4  evaluation by loop depth", [sys.executable, "pretrain/evaluate.py", "--run", str(_run_path())]),
    ):
        console.rule(title, align="left")
        if command == _training_command() and _is_trained():
            console.print(f"{_run_path()}: already trained; remove that folder to train again")
            continue
        status = _run(command)
        if status != EXIT_FINISHED:
            console.print(f"the demo stopped with status {status}; `make demo` goes on from where it was")
            return status
    console.rule("4/4  a sample", align="left")
    sample = subprocess.run(_sampling_command(), cwd=ROOT, env=_environment(), capture_output=True, text=True)
    if sample.returncode != EXIT_FINISHED:
        console.print(sample.stderr.strip())
        return EXIT_FAILED
    console.print(Panel(sample.stdout.strip(), title=f'prompt: "{PROMPT}"'), markup=False)
    _print_summary(console)
    console.print(f"took {(time.monotonic() - started) / 60:.1f} minutes, set-up not counted")
    return EXIT_FINISHED


def _environment() -> dict[str, str]:
    """One thread a rank: two ranks share two cores. The tools of ``.venv`` are found without activating it."""
    tools = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _run(command: list[str]) -> int:
    """Run one part; its output is the user's, and Ctrl-C reaches it first."""
    process = subprocess.Popen(command, cwd=ROOT, env=_environment())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        return 130


def _training_command() -> list[str]:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", str(RANKS), "--log_level", "error", "pretrain/main.py", "--config", RUN_CONFIG]


def _sampling_command() -> list[str]:
    return [
        *(sys.executable, "pretrain/generate.py", "--run", str(_run_path()), "--prompt", PROMPT),
        *("--max-new-tokens", str(SAMPLE_TOKENS), "--temperature", "0.7", "--top-p", "0.9"),
    ]


def _config() -> Any:
    from pretrain.config import TrainingConfig

    return load_settings(TrainingConfig, ROOT / RUN_CONFIG)


def _run_path() -> Path:
    path: Path = _config().run.path
    return path


def _is_trained() -> bool:
    """Whether the run directory holds the last checkpoint of exactly this configuration."""
    from pretrain.checkpoint import step_folder_name

    config = _config()
    record = config.run.path / "config.json"
    last = config.run.path / "checkpoints" / step_folder_name(config.schedule.steps) / "manifest.json"
    if not (last.is_file() and record.is_file()):
        return False
    return bool(json.loads(record.read_text()) == config.model_dump(mode="json"))


def _print_summary(console: Console) -> None:
    from data_pipeline.dataset import open_dataset
    from model.parameters import count_parameters
    from pretrain.evaluate import gzip9_bits_per_byte

    config = _config()
    run: Path = config.run.path
    count = count_parameters(config.model, config.mean_loops)
    evaluation = json.loads((run / "evaluation.json").read_text())["by_loops"]
    tokens = config.schedule.steps * config.data.global_batch_size * config.data.sequence_length
    table = Table(title="Ice demo", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters, total", f"{count.total:,}")
    table.add_row("parameters, active a token", f"{count.active:,}")
    table.add_row("tokens seen", f"{tokens:,}")
    table.add_section()
    for depth, result in evaluation.items():
        label = {1: " (no recurrence)", config.mean_loops: " (trained mean)", 2 * config.mean_loops: " (twice)"}
        table.add_row(
            f"held-out bits a byte, {depth} loop{'s' if int(depth) > 1 else ''}{label.get(int(depth), '')}",
            f"{result['bits_per_byte']:.3f}",
        )
    reference = gzip9_bits_per_byte(open_dataset(config.data.path))
    table.add_row("gzip -9 on the same text", f"{reference:.3f}")
    console.print(table)
    console.print(f"loss plot      {run / 'plots' / 'loss.png'}")
    console.print(f"depth plot     {run / 'plots' / 'depth.png'}")
    console.print(f"run directory  {run}")


if __name__ == "__main__":
    sys.exit(main())
