"""A local Slurm cluster and its jobs, for tests: submit, look, wait, and break nodes.

``local_slurm.sh`` starts Slurm's own daemons on this machine, one node a set of namespaces. It needs root and four
Debian packages; nothing is installed here.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

SCRIPT = Path(__file__).with_name("local_slurm.sh")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def local_slurm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of ``local_slurm.sh``."""
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=120)


def wait_for(condition: Callable[[], object], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    """Return when ``condition`` holds; fail after ``seconds`` with what ``what`` then says."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds} s\n{what()[-6000:]}"
        time.sleep(0.1)


@dataclass(frozen=True)
class SlurmJob:
    """A submitted job and its log."""

    number: str
    log: Path

    def field(self, name: str) -> str:
        """Such as ``JobState``; empty while Slurm has none."""
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", self.number], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(rf"(?:^| ){name}=(\S*)", shown)
        return found[1] if found else ""

    @property
    def state(self) -> str:
        return self.field("JobState")

    @property
    def restarts(self) -> int:
        return int(self.field("Restarts"))

    @property
    def nodes(self) -> list[str]:
        """The nodes it runs on, its batch shell on the first."""
        names = subprocess.run(
            ["scontrol", "show", "hostnames", self.field("NodeList")], capture_output=True, text=True, check=True
        )
        return names.stdout.split()

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_text(self, wanted: str, seconds: float) -> None:
        wait_for(lambda: wanted in self.text(), seconds, lambda: f"no {wanted!r} in the log of {self}:\n{self.text()}")

    def wait_for_restart(self, number: int, seconds: float = 300) -> None:
        """Until the job runs again, for the ``number``-th time after the first or more."""
        wait_for(lambda: self.restarts >= number and self.state == "RUNNING", seconds, self.text)

    def wait_for_end(self, seconds: float = 300) -> str:
        """The state that the job ended in."""
        wait_for(lambda: self.state in ENDED, seconds, lambda: f"{self.state}:\n{self.text()}")
        return self.state

    def update(self, **settings: str) -> None:
        pairs = [f"{name}={value}" for name, value in settings.items()]
        subprocess.run(["scontrol", "update", f"JobId={self.number}", *pairs], check=True, capture_output=True)

    def cancel(self) -> None:
        subprocess.run(["scancel", self.number], check=False, capture_output=True)

    def ranks(self) -> list[psutil.Process]:
        """The training processes of the present start, in rank order; all nodes' processes are this machine's."""
        ranks = {}
        start = (self.number, self.restarts)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if "pretrain/main.py" not in process.cmdline() or "python" not in process.name():
                    continue
                values = process.environ()
                if (values.get("SLURM_JOB_ID"), int(values.get("SLURM_RESTART_COUNT", "0"))) == start:
                    ranks[int(values["RANK"])] = process
        return [ranks[rank] for rank in sorted(ranks)]


@contextlib.contextmanager
def held(processes: list[psutil.Process]) -> Iterator[None]:
    """The processes stand still inside this block."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def submit(root: Path, log: Path, *arguments: str, **environment: str) -> SlurmJob:
    """``sbatch ARGUMENTS`` from the top folder of the checkout."""
    number = subprocess.run(
        ["sbatch", "--parsable", f"--output={log}", *arguments],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return SlurmJob(number, log)
