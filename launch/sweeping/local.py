"""Cells as processes of this machine: a few at once, each resumed when it breaks, all asked to save when we must stop.

How a start of a cell ends decides what becomes of it, as in ``slurm/common.sh``:

    finished on the disk   finished, whatever the status
    78                     refused: wrong configuration or data; not tried again, the others go on
    else                   started again, unless it ended more than ``retries`` times in a row without newer checkpoint

The status alone is not believed: the launcher of several ranks returns 0 when its helper was killed.

Each cell has a session of its own, so that Ctrl-C reaches this process only, which passes it on as USR1 to the training
processes: not to the launcher, which would kill them before they have saved. A cell that outlives a killed sweep holds
the cell's lock; the next sweep waits for it instead of training beside it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal

import psutil

from launch import retry_budget
from launch.environment import free_port, name_accelerator
from launch.settings import EXIT_BAD_INPUT, BadInputError
from launch.sweeping.folder import LOCK, LOG, CellFolder
from launch.sweeping.lock import try_lock
from launch.sweeping.settings import SweepSettings

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

State = Literal["waiting", "running", "elsewhere", "finished", "refused", "failed"]
Say = Callable[[str], None]


@dataclass
class CellRun:
    """A cell, what has become of it, and how often it was started by this process."""

    folder: CellFolder
    state: State = "waiting"
    starts: int = 0

    @property
    def name(self) -> str:
        """The cell's."""
        return self.folder.cell.name


class Stop:
    """Remembers that this process was asked to stop, and how often; the handlers last as long as the block."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


@dataclass
class CellProcess:
    """One start of a cell; what it says goes to the cell's ``train.log``."""

    run: CellRun
    slot: int
    process: subprocess.Popen[bytes]
    lock: IO[Any]
    _asked: set[int] = field(default_factory=set)

    def ask_to_save(self) -> None:
        """USR1 to every training process that has not had it; called again for ranks that are started meanwhile."""
        for rank in self._ranks():
            if rank.pid not in self._asked:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(signal.SIGUSR1)
                    self._asked.add(rank.pid)

    def kill(self) -> None:
        """End launcher and ranks at once."""
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _ranks(self) -> list[psutil.Process]:
        ranks = []
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = process.cmdline()
                is_rank = any(word.startswith("--local_rank") for word in words) or process.pid == self.process.pid
                if is_rank and str(ROOT / "pretrain" / "main.py") in words and "--master_port" not in words:
                    ranks.append(process)
        return ranks

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []


class LocalRunner:
    """Runs the cells that are not finished, at most ``parallel`` at once. Built and used in the main thread."""

    def __init__(
        self, sweep: SweepSettings, folders: list[CellFolder], say: Say, finished: Callable[[CellFolder], None]
    ) -> None:
        """``say`` takes a line for people; ``finished`` is called after a cell has become so.

        Raises ``BadInputError`` when this machine has GPUs, but fewer than a cell has ranks.
        """
        self.runs = [CellRun(folder, "finished" if folder.is_finished() else "waiting") for folder in folders]
        self._sweep, self._say, self._finished = sweep, say, finished
        self._job = f"sweep-{secrets.token_hex(4)}"  # retries are counted anew by each start of a sweep
        self._devices = _devices()
        if self._devices and len(self._devices) < sweep.ranks:
            raise BadInputError(f"ranks = {sweep.ranks}: cells here can have {len(self._devices)} GPUs at most")

    def run(self, stop: Stop, each_poll: Callable[[], None] = lambda: None) -> None:
        """Until no cell can go on, or, once ``stop`` is set, until the running ones have saved and ended."""
        waiting = deque(run for run in self.runs if run.state == "waiting")
        slots = list(range(self._sweep.parallel))
        running: list[CellProcess] = []
        while running or (waiting and not stop.count):
            for _ in range(len(waiting) if not stop.count else 0):
                if not slots:
                    break
                run = waiting.popleft()
                process = self._start(run, slots[0])
                if process is not None:
                    running.append(process)
                    slots.pop(0)
                elif run.state != "finished":
                    waiting.append(run)
            for process in running:
                if stop.count > 1:
                    process.kill()
                elif stop.count:
                    process.ask_to_save()
            time.sleep(POLL_SECONDS)
            for process in [process for process in running if process.process.poll() is not None]:
                running.remove(process)
                slots.insert(0, process.slot)
                self._end(process, bool(stop.count))
                if process.run.state == "waiting":
                    waiting.appendleft(process.run)
            each_poll()

    def _start(self, run: CellRun, slot: int) -> CellProcess | None:
        folder = run.folder
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = (folder.path / LOCK).open("a")
        if not try_lock(lock):
            lock.close()
            if run.state != "elsewhere":
                self._say(f"{run.name}: a process of an earlier start still trains it; waiting for its end")
            run.state = "elsewhere"
            return None
        if folder.is_finished():  # by such a process
            lock.close()
            run.state = "finished"
            self._finished(folder)
            return None
        plan = folder.prepare()
        if not run.starts:
            retry_budget.begin(self._job, folder.path)
        with (folder.path / LOG).open("ab") as log:
            process = subprocess.Popen(
                training_command(plan, self._sweep.ranks, bool(self._devices)),
                env=self._environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock.fileno(),),
            )
        run.state, run.starts = "running", run.starts + 1
        step = retry_budget.newest_committed_step(folder.path)
        where = f"goes on from step {step}" if step >= 0 else "starts"
        self._say(f"{run.name}: {where}, {folder.cell.steps} steps, {folder.cell.budget.training_flops:.3g} FLOPs")
        return CellProcess(run, slot, process, lock)

    def _end(self, ended: CellProcess, stopping: bool) -> None:
        run, status = ended.run, ended.process.returncode
        folder = run.folder
        ended.lock.close()
        if folder.is_finished():
            run.state = "finished"
            self._finished(folder)
        elif status == EXIT_BAD_INPUT:
            run.state = "refused"
            self._say(f"{run.name}: refused, not tried again: {last_words(folder.path / LOG)}")
        elif stopping:
            run.state = "waiting"
            self._say(f"{run.name}: ended with status {status}")
        else:
            state = retry_budget.end(self._job, folder.path)
            given_up = state.without_progress > self._sweep.retries
            run.state = "failed" if given_up else "waiting"
            what = f"no newer checkpoint in {state.without_progress} starts; given up" if given_up else "tried again"
            self._say(f"{run.name}: ended with status {status}, {what}: {last_words(folder.path / LOG)}")

    def _environment(self, slot: int) -> dict[str, str]:
        """The tools of this interpreter's environment; a share of the cores, and of the GPUs where there are any."""
        ranks = self._sweep.ranks
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        threads = max(1, (os.cpu_count() or 1) // (ranks * self._sweep.parallel))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PATH": path}
        if self._devices:
            first = slot * ranks
            mine = [self._devices[number % len(self._devices)] for number in range(first, first + ranks)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        return environment


def training_command(plan: Path, ranks: int, on_gpus: bool) -> list[str]:
    """What trains a cell: the ordinary command, through DeepSpeed's launcher when there are several ranks."""
    training = [str(ROOT / "pretrain" / "main.py"), "--config", str(plan)]
    if ranks == 1:
        return [sys.executable, "-u", *training]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error"]
    # On GPUs it starts a rank for each that CUDA_VISIBLE_DEVICES names.
    return [*launcher, *([] if on_gpus else ["--num_gpus", str(ranks)]), "--master_port", str(free_port()), *training]


def last_words(log: Path) -> str:
    """The last line of a log that is an error, or the last at all."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-40:] if line.startswith("error:")]
    return (errors or lines or ["it said nothing"])[-1].strip()


def _devices() -> list[str]:
    """The GPUs that cells may use, by CUDA's names; none on a machine without."""
    name_accelerator()
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]
