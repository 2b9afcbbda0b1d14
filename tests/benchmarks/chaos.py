"""A run that is hurt again and again must end as the one that never was, to the bit.

    python tests/benchmarks/chaos.py --minutes 20 [--steps 1000] [--seed 1] [--json FILE]

trains the tiny model of the tests (ZeRO-3, EP = 2, two ranks, sampled depth, every idea that has state) once
undisturbed and once under faults, through the real command line: the same command is started again after each. Faults
are drawn from ``--seed`` and injected at random instants while the run trains, until the time is over; then it is left
in peace to its end. Loss, norm, depth and sample position of every step, every evaluation, and the weights and biases
of the last checkpoint must equal the undisturbed run's, byte for byte.

==================  ===================================================================================================
kill a rank         SIGKILL; the other must follow
kill all            launcher and both ranks at once, as a node without power
kill while saving   SIGKILL of a rank when a save has begun to write
kill in evaluation  SIGKILL of a rank after the step that is followed by one
SIGTERM             to one rank: both save, status 75
SIGSTOP             of a rank: the watchdog ends the run resumably
flip a byte         of the newest checkpoint, after a kill
cut a file          of the newest checkpoint to half, after a kill
lose a file         of the newest checkpoint, after a kill
fill the disk       the run's file system (a small tmpfs) while it trains; freed after some seconds
==================  ===================================================================================================

The last needs root, and is left out with a word without it. Every start costs imports (13 s on two idle cores), so
twenty minutes hold about forty faults. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "multirank")]

from training_runs import (  # noqa: E402
    Launch,
    committed,
    difference_of_runs,
    make_dataset,
    training_lines,
    write_config,
)

CHECKPOINT_EVERY, EVALUATE_EVERY, KEPT = 5, 20, 3
DISK_MEGABYTES = 64
# What the launcher may end with after a fault, by its first process that ended; 78 would be a refusal to go on.
PREEMPTED = 75
RESUMABLE = {0, 1, PREEMPTED, -9, 137, 247}
UNPROVOKED_ENDS = 3
START_SECONDS, END_SECONDS = 300.0, 240.0


class Victim:
    """One start of the run that will be hurt, and what a fault may do to it."""

    def __init__(self, config: Path, run: Path, generator: random.Random) -> None:
        self.run, self.generator = run, generator
        self.launch = Launch(ROOT, config)
        self._killed = False

    @property
    def running(self) -> bool:
        """Whether the launcher lives."""
        return self.launch.process.poll() is None

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether ``condition`` came true while the run lives, within ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.005)
        return False

    def wait_for_training(self) -> bool:
        """Whether a step was taken since this start."""
        generation = self.run / "generation.json"
        before = generation.stat().st_mtime_ns if generation.exists() else 0

        def taken_over() -> bool:
            return generation.exists() and generation.stat().st_mtime_ns != before

        # Taking over shortens metrics.jsonl to the checkpoint, so a change of its last step is no step taken.
        if not self.wait_until(lambda: taken_over() and self.resumed_after() is not None, START_SECONDS):
            return False
        resumed = self.resumed_after()
        return self.wait_until(lambda: last_step(self.run) > (resumed or 0), START_SECONDS)

    def resumed_after(self) -> int | None:
        """The step that this start has said it resumes after, 0 from the beginning; None when it said nothing yet."""
        text = " ".join(self.launch.log.read_text().split())  # lines may be wrapped
        if found := re.search(r"resuming after step (\d+);", text):
            return int(found[1])
        return 0 if "from the beginning;" in text else None

    def a_rank(self) -> psutil.Process | None:
        """One of the two, at random."""
        ranks = self.launch.ranks()
        return self.generator.choice(ranks) if ranks else None

    def signal_a_rank(self, send: Callable[[psutil.Process], None]) -> bool:
        """Do ``send`` to a rank; false when none lives any more."""
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = self.a_rank()
            if rank is not None:
                send(rank)
                return True
        return False

    def kill(self) -> bool:
        """End launcher and ranks at once; false when the run had ended."""
        if not self.running:
            return False
        self.launch.kill()
        self._killed = True
        return True

    def end(self) -> int:
        """Wait for the end of all its processes; the launcher's status. A run that does not end is a failure."""
        if self._killed:
            return -signal.SIGKILL
        try:
            status = self.launch.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            text = self.launch.log.read_text()[-3000:]
            self.launch.kill()
            raise SystemExit(f"the run did not end in {END_SECONDS} s:\n{text}") from None
        return status


def last_step(run: Path) -> int:
    """The last step in ``metrics.jsonl``; 0 without one."""
    with contextlib.suppress(FileNotFoundError, IndexError):
        return int(training_lines(run)[-1]["step"])
    return 0


def newest_files(run: Path) -> list[Path]:
    """The files of the newest checkpoint, if there is an older one to fall back to."""
    steps = committed(run)
    if len(steps) < 2:
        return []
    folder = run / "checkpoints" / f"step_{steps[-1]:08d}"
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1)


def kill_a_rank(victim: Victim) -> bool:
    return victim.signal_a_rank(psutil.Process.kill)


def kill_all(victim: Victim) -> bool:
    return victim.kill()


def kill_while_saving(victim: Victim) -> bool:
    partial = victim.run / "checkpoints"
    if not victim.wait_until(lambda: any(partial.glob("partial_*/content/*")), 60):
        return False
    time.sleep(victim.generator.random() * 0.3)
    return kill_a_rank(victim)


def kill_in_evaluation(victim: Victim) -> bool:
    if not victim.wait_until(lambda: last_step(victim.run) % EVALUATE_EVERY == 0, 60):
        return False
    time.sleep(victim.generator.random() * 0.1)
    return kill_a_rank(victim)


def terminate(victim: Victim) -> bool:
    return victim.signal_a_rank(psutil.Process.terminate)


def stop(victim: Victim) -> bool:
    return victim.signal_a_rank(psutil.Process.suspend)


def hurt_newest(change: Callable[[Path, random.Random], None]) -> Callable[[Victim], bool]:
    """A kill, then ``change`` of a file of the newest checkpoint."""

    def fault(victim: Victim) -> bool:
        if not victim.wait_until(lambda: len(committed(victim.run)) >= 2, 60) or not kill_all(victim):
            return False
        files = newest_files(victim.run)
        if files:
            change(victim.generator.choice(files), victim.generator)
        return bool(files)

    return fault


def flip_a_byte(path: Path, generator: random.Random) -> None:
    with path.open("r+b") as file:
        place = generator.randrange(path.stat().st_size)
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ 1 << generator.randrange(8)]))


def cut(path: Path, generator: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


def fill_the_disk(victim: Victim) -> bool:
    ballast = victim.run.parent / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(2**20))
                file.flush()
        victim.wait_until(lambda: False, 2 + 4 * victim.generator.random())
    finally:
        ballast.unlink(missing_ok=True)
    victim.wait_until(lambda: False, 3)
    kill_all(victim)
    return True


FAULTS: dict[str, Callable[[Victim], bool]] = {
    "kill a rank": kill_a_rank,
    "kill all": kill_all,
    "kill while saving": kill_while_saving,
    "kill in evaluation": kill_in_evaluation,
    "SIGTERM": terminate,
    "SIGSTOP": stop,
    "flip a byte": hurt_newest(flip_a_byte),
    "cut a file": hurt_newest(cut),
    "lose a file": hurt_newest(lambda path, _: path.unlink()),
    "fill the disk": fill_the_disk,
}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """``folder`` as a tmpfs of ``DISK_MEGABYTES``; whether that was possible."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "ice-chaos", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def configure(folder: Path, data: Path, name: str, steps: int) -> Path:
    """The tests' configuration for a longer run; the watchdog is quick, to make hangs cheap."""
    path = write_config(folder, data, name)
    values = json.loads(path.read_text())
    values["schedule"].update(steps=steps)
    values["checkpoint"].update(every=CHECKPOINT_EVERY, keep_last=KEPT)
    values["eval"].update(every=EVALUATE_EVERY)
    values["logging"].update(console_every=50)
    values["watchdog"] = {"silence_seconds": 15.0, "floor_seconds": 60.0, "ceiling_seconds": 300.0}
    path.write_text(json.dumps(values))
    return path


def hurt(config: Path, run: Path, kinds: list[str], minutes: float, seed: int) -> dict[str, Any]:
    """Start, hurt, start again until the time is over or the run is; then to its end. What happened, by kind."""
    generator = random.Random(seed)
    deadline = time.monotonic() + 60 * minutes
    injected: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    repeated: dict[str, list[int]] = defaultdict(list)
    statuses: dict[str, Counter[int]] = defaultdict(Counter)
    order: list[str] = []
    unprovoked = 0
    before: tuple[str, int] | None = None  # the last fault, and the step the run had reached
    while True:
        at_peace = time.monotonic() > deadline
        victim = Victim(config, run, generator)
        training = victim.wait_for_training()
        resumed = victim.resumed_after()
        if before is not None and resumed is not None:
            repeated[before[0]].append(before[1] - resumed)
            before = None
        if at_peace or not training:
            status = victim.launch.process.wait(3600)
            if status == 0:
                break
            # On a machine too busy to give a sign of life in time the watchdog ends a run that nothing ails.
            unprovoked += 1
            if status != PREEMPTED or unprovoked > UNPROVOKED_ENDS:
                raise SystemExit(f"status {status} without a fault:\n{victim.launch.log.read_text()[-3000:]}")
            continue
        victim.wait_until(lambda: False, generator.random() * 4)
        if not order:
            order = generator.sample(kinds, len(kinds))
        kind = order.pop()
        happened = FAULTS[kind](victim)
        status = victim.end()
        reached = last_step(run)
        if status not in RESUMABLE:
            raise SystemExit(f"status {status} after {kind!r}:\n{victim.launch.log.read_text()[-3000:]}")
        (injected if happened else missed)[kind] += 1
        statuses[kind][status] += 1
        before = (kind, reached) if happened else None
        print(f"{sum(injected.values()):4} {kind:20} at step {reached:5}, status {status}", file=sys.stderr, flush=True)
        if status == 0:
            break
    return {
        "injected": dict(injected),
        "came_too_late": dict(missed),
        "steps_repeated": dict(repeated),
        "statuses": {kind: dict(counts) for kind, counts in statuses.items()},
        "ended_without_a_fault": unprovoked,
    }


def main() -> int:
    """Run both, compare, print the table and one line of JSON; status 1 when the runs differ."""
    parser = argparse.ArgumentParser(description="Faults at random instants, and the same result.")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults are injected")
    parser.add_argument("--steps", type=int, default=1000, help="more than are trained in that time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the last line there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ice-chaos-") as name, small_disk(Path(name) / "disk") as has_disk:
        folder = Path(name)
        data = make_dataset(folder, seed=1)
        kinds = [kind for kind in FAULTS if has_disk or kind != "fill the disk"]
        if not has_disk:
            print("no root: the disk is not filled", file=sys.stderr)
        started = time.monotonic()
        undisturbed = configure(folder, data, "undisturbed", options.steps)
        status, output = Launch(ROOT, undisturbed, "--set", "watchdog.enabled=false").end(timeout_seconds=3600)
        if status != 0:
            raise SystemExit(f"the undisturbed run ended with {status}:\n{output[-3000:]}")
        quiet_seconds = time.monotonic() - started
        config = configure(folder, data, "hurt", options.steps)
        values = json.loads(config.read_text())
        values["run"]["dir"] = str(folder / "disk")
        config.write_text(json.dumps(values))
        started = time.monotonic()
        happened = hurt(config, folder / "disk" / "hurt", kinds, options.minutes, options.seed)
        seconds = time.monotonic() - started
        difference = difference_of_runs(folder / "disk" / "hurt", folder / "runs" / "undisturbed", options.steps)
    total = sum(happened["injected"].values())
    table = Table(title=f"{total} faults in {seconds / 60:.0f} minutes, {options.steps} steps")
    for column in ("fault", "injected", "steps repeated, mean", "most", "statuses"):
        table.add_column(column, justify="left" if column in ("fault", "statuses") else "right")
    for kind, count in happened["injected"].items():
        steps = happened["steps_repeated"].get(kind, [])
        mean, most = (f"{sum(steps) / len(steps):.1f}", str(max(steps))) if steps else ("", "")
        counts = ", ".join(f"{status} x {number}" for status, number in sorted(happened["statuses"][kind].items()))
        table.add_row(kind, str(count), mean, most, counts)
    Console().print(table)
    print("equal to the undisturbed run, to the bit" if difference is None else f"DIFFERENT: {difference}")
    result = {
        **happened,
        "faults": total,
        "seconds": seconds,
        "undisturbed_seconds": quiet_seconds,
        "steps": options.steps,
        "difference": difference,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if difference is None else 1


if __name__ == "__main__":
    sys.exit(main())
