"""The 1B variant itself on two ranks of this machine: five optimizer steps, a checkpoint, and the resume from it.

    OMP_NUM_THREADS=1 python tests/benchmarks/real_1b.py --folder /big/disk [--json FILE]

``configs/ice_1b.json``, all 1.03 billion parameters, ZeRO-3 with EP = 2, bf16 with fp32 master weights, sampled depth
(16 loops on average, 8 with gradients), every scale and expert, through the real command line. What differs from the
file is what one small machine without a GPU needs, and is printed: short sequences, a small batch, no warm-up,
parameters partitioned while they are drawn, gradients reduced and weights stepped in small pieces, saves that write
straight from the live tensors. Everything is in memory: fp32 would take 24 bytes a parameter with what is gathered,
and states on a disk cannot be saved (the engine refuses that for experts).

First the run goes to its end, saving after step 3. Then the last checkpoint is taken away and the same command started
again: it must resume after step 3 and repeat steps 4 and 5 to the bit. Reported: seconds a step, memory of both ranks
together (sampled twice a second), bytes and seconds of the checkpoint.

Needs about 21 GiB of memory, 45 GB of disk and a processor with nothing else to do; one without bf16 arithmetic takes
minutes a step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "multirank")]

from training_runs import Launch, committed, make_dataset, training_lines  # noqa: E402

STEPS, SAVED_AFTER, LENGTH = 5, 3, 32
REPEATED = ("step", "loss", "grad_norm", "loops", "next_sample")
START_SECONDS = 3600.0


def changes(data: Path, folder: Path) -> dict[str, Any]:
    """What this machine needs other than ``configs/ice_1b.json`` says."""
    return {
        "run.name": "real_1b",
        "run.dir": str(folder / "runs"),
        "data.path": str(data),
        "data.sequence_length": LENGTH,
        "data.global_batch_size": 2,
        "schedule.steps": STEPS,
        "schedule.warmup_steps": 0,
        "schedule.decay_steps": 1,
        "parallel.expert_parallel_size": 2,
        "parallel.micro_batch_size": 1,
        "parallel.zero_init": True,
        "parallel.reduce_bucket_size": 20_000_000,
        "parallel.sub_group_size": 50_000_000,
        "checkpoint.every": SAVED_AFTER,
        "checkpoint.asynchronous": False,
        "checkpoint.plain_weights": False,
        "eval.sequences": 4,
        "logging.wandb": "disabled",
        "watchdog.floor_seconds": 1800.0,
        "watchdog.silence_seconds": 600.0,
    }


class MemoryWatch:
    """The most bytes that a launch's ranks held together, what they share counted once; and the machine's least free.

    From ``/proc/PID/statm``: proportional set sizes would walk ten gigabytes of pages at each look.
    """

    def __init__(self, launch: Launch) -> None:
        self.peak, self.least_available = 0, psutil.virtual_memory().available
        self._launch = launch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Look no longer."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes = [rank.memory_info() for rank in self._launch.ranks()]
                shared = max((size.shared for size in sizes), default=0)
                self.peak = max(self.peak, sum(size.rss - size.shared for size in sizes) + shared)
            self.least_available = min(self.least_available, psutil.virtual_memory().available)


def run(config: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Start the run and wait for its end; its memory and seconds."""
    arguments = [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    started = time.monotonic()
    launch = Launch(ROOT, config, *arguments)
    watch = MemoryWatch(launch)
    try:
        status, output = launch.end(timeout_seconds=START_SECONDS)
    finally:
        watch.end()
    if status != 0:
        raise SystemExit(f"the run ended with status {status}:\n{output[-5000:]}")
    return {
        "seconds": time.monotonic() - started,
        "peak_bytes": watch.peak,
        "least_available_bytes": watch.least_available,
        "output": output,
    }


def bytes_below(folder: Path) -> int:
    """The size of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """Train, save, resume, compare, report; status 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where 45 GB fit; default the system's temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ice-1b-", dir=options.folder) as name:
        folder = Path(name)
        data = make_dataset(folder, seed=1)
        config = folder / "ice_1b.json"
        shutil.copy(ROOT / "configs" / "ice_1b.json", config)
        overrides = changes(data, folder)
        print("\n".join(f"{key} = {json.dumps(value)}" for key, value in overrides.items()), flush=True)
        run_folder = folder / "runs" / "real_1b"
        whole = run(config, overrides)
        lines = training_lines(run_folder)
        saved = committed(run_folder)
        size = bytes_below(run_folder / "checkpoints" / f"step_{SAVED_AFTER:08d}")
        shutil.rmtree(run_folder / "checkpoints" / f"step_{STEPS:08d}")
        resumed = run(config, overrides)
        again = training_lines(run_folder)
    problems = []
    losses = [line["loss"] for line in lines]
    if len(losses) != STEPS or not all(math.isfinite(loss) for loss in losses) or losses[-1] >= losses[0]:
        problems.append(f"losses {losses}")
    if saved != [SAVED_AFTER, STEPS]:
        problems.append(f"checkpoints {saved}")
    if f"resuming after step {SAVED_AFTER}" not in " ".join(resumed["output"].split()):
        problems.append("no resume after the checkpoint")
    for line, other in zip(lines, again, strict=True):
        problems += [f"{key} of step {line['step']}" for key in REPEATED if line[key] != other[key]]
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    table = Table(title=f"ice_1b on two ranks, OMP_NUM_THREADS={threads}")
    for column in ("step", "loss", "grad norm", "loops", "seconds"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            str(line["step"]),
            f"{line['loss']:.4f}",
            f"{line['grad_norm']:.3f}",
            str(line["loops"]),
            f"{line['step_seconds']:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for title, part in (("the whole run", whole), ("the resumed run", resumed)):
        print(
            f"{title}: {part['seconds']:.0f} s, both ranks together at most {part['peak_bytes'] / 2**30:.1f} GiB, "
            f"the machine had at least {part['least_available_bytes'] / 2**30:.1f} GiB left"
        )
    print(f"a checkpoint: {size / 2**30:.1f} GiB")
    print(f"FAIL  {problems}" if problems else "pass  steps 4 and 5 after the resume equal the first ones to the bit")
    if options.json is not None:
        figures = [{k: v for k, v in part.items() if k != "output"} for part in (whole, resumed)]
        result = {"steps": lines, "whole": figures[0], "resumed": figures[1], "checkpoint_bytes": size}
        options.json.write_text(json.dumps({**result, "problems": problems}, indent=1) + "\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
