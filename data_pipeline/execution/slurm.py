"""Pieces on Slurm: each pipeline becomes job arrays, whose tasks ask this process for pieces until all are done.

This process, the *driver*, is itself a small job (``sbatch slurm/data.sh --config FILE``) or runs on a login node. For
each pipeline it

1. listens on a port of its own and writes where, with a random key, to ``LOGS/workers.json`` (mode 0600);
2. submits ``min(tasks, pieces)`` array tasks, in arrays of at most ``max_array_size``; each runs worker.py, which
   connects, proves that it knows the key, gets the pipeline and then piece after piece;
3. hands out pieces (crew.py), asks ``squeue`` now and then whether tasks are left, and cancels what is still pending at
   the end.

Why a connection, and not a file per task as datatrove has: a free task takes the next piece, so an uneven corpus and a
half-granted array still finish together; an error reaches the user's terminal at once; a task ends with the driver;
and nothing is unpickled from a disk. It needs TCP from node to node, as training does. Traffic is signed at the
beginning, not encrypted: the cluster's inner network is trusted, as it is by torch.distributed.

Lost tasks (time limit, memory, a dead node): their pieces go to another attempt at the stage, with new arrays, in a new
folder; a process that Slurm believes dead can then do no harm (pieces.py). Slurm's own requeueing is therefore off.
Only ``sbatch``, ``squeue`` and ``scancel`` are used; no accounting is needed.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path

import dill  # type: ignore[import-untyped]
from datatrove.pipeline.base import PipelineStep

from data_pipeline.config import SlurmSettings
from data_pipeline.execution.crew import Finished, Joined, Lost, hand_out
from data_pipeline.execution.pieces import Work
from data_pipeline.execution.worker import receive_result, send_piece, send_work
from launch.settings import BadInputError

ROOT = Path(__file__).resolve().parents[2]
EVENT_SECONDS = 0.5
LISTEN_BACKLOG = 1024
# A node that fell silent is noticed after 60 + 4 * 15 seconds.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))
LOG_TAIL_CHARACTERS = 200


class SlurmExecutor:
    """Runs pieces in Slurm arrays; see the module's docstring."""

    def __init__(self, settings: SlurmSettings) -> None:
        self.settings = settings

    def run(self, pipeline: Sequence[PipelineStep], tasks: int, logs: Path) -> None:
        """See ``Executor``; raises ``WorkersLostError`` when tasks ended before their pieces did."""
        work = Work.of(pipeline, tasks, logs.absolute())
        todo = work.start()
        before = work.files_before()
        if todo:
            with _tidy_when_terminated(), _Tasks(work, min(self.settings.tasks, len(todo)), self.settings) as crew:
                hand_out(work, todo, crew, lost_is_failure=False)
        work.check_complete(before)


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """Let SIGTERM (from scancel, or at the driver's own time limit) unwind the stack, so that arrays are cancelled."""

    def leave(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the tidying off
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def slurm_command(*arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands. ``BadInputError`` when it is not there.

    A driver that is a job has variables of its own job, which sbatch would take for options of the new one.
    """
    environment = {
        name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith("SLURM_")
    }
    try:
        return subprocess.run(arguments, env=environment, input=script, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BadInputError(
            f"--executor slurm: {arguments[0]} is not on PATH; run this on a machine of a Slurm cluster"
        ) from None


def own_addresses() -> list[str]:
    """This machine's name, then the addresses that it stands for here, for machines that do not know the name."""
    name = socket.gethostname()
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError:
        found = set()
    return [name, *sorted(found)]


def submit(settings: SlurmSettings, tasks: int, name: str, command: Sequence[str], logs: Path) -> str:
    """Submit one array of ``tasks`` tasks that run ``command`` in this folder; returns the job's id."""
    options = [
        f"--job-name={name}",
        f"--array=0-{tasks - 1}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={settings.cpus_per_task}",
        f"--mem-per-cpu={settings.mem_per_cpu_gb}G",
        f"--time={settings.time}",
        f"--chdir={Path.cwd()}",
        f"--output={logs}/%A_%a.log",
        "--no-requeue",
        *(f"--{key}={value}" for key in ("partition", "account") if (value := getattr(settings, key))),
        *settings.arguments,
    ]
    script = f"#!/bin/sh\nexec {shlex.join(command)}\n"
    result = slurm_command("sbatch", "--parsable", *options, script=script)
    if result.returncode != 0:
        reason = " ".join(result.stderr.split()) or f"status {result.returncode}"
        raise BadInputError(f"execution.slurm: sbatch refused ({reason}); correct the section, as with --set")
    return result.stdout.strip().split(";")[0]


class _Tasks:
    """The tasks of some Slurm arrays as a crew, each with a socket."""

    def __init__(self, work: Work, tasks: int, settings: SlurmSettings) -> None:
        self._payload = dill.dumps(work)
        self._settings = settings
        self._logs = work.logs / "slurm"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._connections: set[Connection] = set()
        self._new: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._key = secrets.token_bytes(32)
        self._listener = socket.create_server(("", 0), backlog=LISTEN_BACKLOG)
        threading.Thread(target=self._accept, daemon=True).start()
        address = self._write_address(work.logs / "workers.json")
        command = [sys.executable, "-m", "data_pipeline.execution.worker", str(address)]
        command = ["env", f"PYTHONPATH={ROOT}", *command]
        name = "ice-" + work.describe(0).split(",")[0].replace(" ", "-")
        self._jobs: list[str] = []
        try:
            for start in range(0, tasks, settings.max_array_size):
                size = min(settings.max_array_size, tasks - start)
                self._jobs.append(submit(settings, size, name, command, self._logs))
        except BaseException:
            self._cancel()
            raise
        self._asked = time.monotonic()

    def _write_address(self, path: Path) -> Path:
        hosts = [self._settings.driver_host] if self._settings.driver_host else own_addresses()
        values = {"hosts": hosts, "port": self._listener.getsockname()[1], "key": self._key.hex()}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(values, file)
            file.flush()
            os.fsync(file.fileno())
        return path

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:  # closed: the pipeline is done
                return
            # In a thread of its own: a stranger who connects and says nothing must not keep the others waiting.
            threading.Thread(target=self._greet, args=(accepted,), daemon=True).start()

    def _greet(self, accepted: socket.socket) -> None:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            accepted.setsockopt(socket.IPPROTO_TCP, option, value)
        connection = Connection(accepted.detach())
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            send_work(connection, self._payload)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
        else:
            self._new.put(connection)

    def events(self) -> Iterator[Joined | Finished | Lost]:
        """See ``Crew``."""
        while not self._new.empty():
            connection = self._new.get()
            self._connections.add(connection)
            yield Joined(connection)
        for ready in wait(list(self._connections), timeout=EVENT_SECONDS):
            assert isinstance(ready, Connection)
            try:
                yield Finished(ready, receive_result(ready))
            except (EOFError, OSError):
                self._connections.remove(ready)
                ready.close()
                yield Lost(ready, self._why())

    def give(self, worker: Hashable, piece: int) -> None:
        """See ``Crew``; that a worker went away shows as an event."""
        assert isinstance(worker, Connection)
        try:
            send_piece(worker, piece)
        except OSError:
            return

    @property
    def over(self) -> str | None:
        """See ``Crew``; asks Slurm now and then while nobody is connected."""
        if self._connections or not self._new.empty():
            return None
        if time.monotonic() - self._asked < self._settings.poll_seconds:
            return None
        self._asked = time.monotonic()
        return None if self._ask_for_tasks() else self._why()

    def _ask_for_tasks(self) -> bool:
        """Whether Slurm has any of our tasks, pending or running; yes, if it cannot be asked just now."""
        for job in self._jobs:
            result = slurm_command("squeue", "--noheader", f"--jobs={job}", "--format=%i %T")
            forgotten = result.returncode != 0 and "Invalid job id" in result.stderr
            if not forgotten and (result.returncode != 0 or result.stdout.strip()):
                return True
        return False

    def _why(self) -> str:
        return f"the Slurm task ended (job {', '.join(self._jobs)}; {self._last_words()})"

    def _last_words(self) -> str:
        """The end of the newest log that says anything, for people: Slurm writes there why it ended a task."""
        logs = [path for path in self._logs.glob("*.log") if path.stat().st_size]
        if not logs:
            return f"nothing in {self._logs}"
        newest = max(logs, key=lambda path: path.stat().st_mtime_ns)
        lines = newest.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{newest} ends: {last[-LOG_TAIL_CHARACTERS:]}"

    def _cancel(self) -> None:
        if self._jobs:
            slurm_command("scancel", *self._jobs)
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def __enter__(self) -> _Tasks:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for connection in self._connections:
            if kind is None:
                self._say_goodbye(connection)
            connection.close()
        self._cancel()

    def _say_goodbye(self, connection: Connection) -> None:
        try:
            send_piece(connection, None)
        except OSError:  # it went by itself
            return
