"""A worker process: is told a pipeline once, then does the pieces that it is given, until told to end.

Over a connection (a pipe from the run on this machine, a socket from one on another) come the work, then piece numbers
and at last null; back goes one JSON message a piece. The end of the connection is the end of the worker, at once and
in the middle of a piece: a run that was killed, by SIGKILL too, leaves nobody behind.

On a cluster: ``python -m data_pipeline.execution.worker FILE``, where FILE (mode 0600, written by slurm.py) says where
the run listens and holds the key by which both sides know each other (multiprocessing's HMAC handshake). The pipeline
is pickled, but never on a disk: what a worker unpickles comes from the run itself.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path

import dill  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from data_pipeline.execution.pieces import Failure, Work

STATUS_RUN_IS_GONE = 3


def send_work(connection: Connection, work: bytes) -> None:
    """Tell a worker what to do; ``work`` is a pickled ``Work``."""
    connection.send_bytes(work)


def send_piece(connection: Connection, piece: int | None) -> None:
    """Let a worker begin a piece, or end."""
    connection.send_bytes(json.dumps(piece).encode())


def receive_result(connection: Connection) -> Failure | None:
    """What became of a worker's piece. Raises ``EOFError`` or ``OSError`` when the worker is gone."""
    value = json.loads(connection.recv_bytes())
    return None if value is None else Failure(**value)


def serve(connection: Connection) -> None:
    """Work until told to end; the process ends when the other side is gone."""
    # Its own lock is a semaphore of the whole machine, which a worker that is killed would leave behind.
    tqdm.set_lock(threading.RLock())
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                messages.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(STATUS_RUN_IS_GONE)

    work: Work = dill.loads(connection.recv_bytes())
    threading.Thread(target=listen, daemon=True).start()
    while (piece := json.loads(messages.get())) is not None:
        failure = work.try_piece(piece)
        connection.send_bytes(json.dumps(failure and asdict(failure)).encode())


def main(file: Path) -> int:
    """Work for the run that ``file`` tells of; 0 when it said that all is done, 3 when there is no such run."""
    try:
        values = json.loads(file.read_text())
    except OSError as error:
        print(f"{file}: cannot be read ({error.strerror}); is the output folder on this machine?", file=sys.stderr)
        return STATUS_RUN_IS_GONE
    problems = []
    for host in values["hosts"]:
        try:
            connection = Client((host, values["port"]), authkey=bytes.fromhex(values["key"]))
        except (OSError, EOFError, AuthenticationError) as error:
            problems.append(f"{host}: {error}")
            continue
        assert isinstance(connection, Connection)
        serve(connection)
        return 0
    print(
        f"the run has ended, or cannot be reached at port {values['port']} ({'; '.join(problems)}): "
        "set execution.slurm.driver_host to a name or address that works on this machine",
        file=sys.stderr,
    )
    return STATUS_RUN_IS_GONE


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
