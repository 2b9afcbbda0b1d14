"""A pool of ranks that lives as long as the test session: processes that form one process group and run jobs.

Importing torch and DeepSpeed costs each process 10 to 20 s, so the ranks are forked from one server that has imported
them, and every test of a given number of ranks uses the same ones. A job is a function ``job(**arguments)`` of an
importable module, called by every rank at once; its arguments and results are pickled.

A job that hangs fails: after its time the ranks write the stacks of all their threads, are killed, and the error shows
them. A rank that raises fails the job too, with its traceback; the pool is then gone and the next test gets a new one.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

DUMP_STACKS = signal.SIGUSR2
PRELOADED = ["torch", "deepspeed"]


class RankFailedError(Exception):
    """A rank raised, died or did not answer in time; the message holds what the ranks last wrote."""


class RankPool:
    """``world_size`` processes; the first job that needs one makes them a process group (gloo, on the CPU)."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size, self._folder = world_size, folder
        self.alive = True
        # The ranks are CPU processes also where this machine has an accelerator.
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._port = port = _free_port()
        self._logs = [folder / f"rank_{rank}.log" for rank in range(world_size)]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            # Not daemons: DeepSpeed's tools start processes of their own.
            process = context.Process(target=_serve, args=(rank, world_size, port, theirs, str(self._logs[rank])))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, job: Callable[..., Any], timeout_seconds: float = 120, **arguments: Any) -> list[Any]:
        """Every rank's result of ``job(**arguments)``, in rank order."""
        request = pickle.dumps((job, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(request)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_seconds
        while len(answers) < self.world_size:
            waiting = {self._pipes[rank]: rank for rank in range(self.world_size) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._end(
                    f"{job.__name__}: ranks {sorted(waiting.values())} gave no answer in {timeout_seconds} s"
                )
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    failed, answer = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise self._end(f"{job.__name__}: rank {rank} died") from None
                if failed:
                    raise self._end(f"{job.__name__}: rank {rank} raised\n{answer}")
                answers[rank] = answer
        return [answers[rank] for rank in range(self.world_size)]

    def _end(self, problem: str) -> RankFailedError:
        """Ask for the stacks, kill, and make the error that tells it all."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, DUMP_STACKS)
        time.sleep(1)
        self.close(kindly=False)
        logs = [f"--- {log.name}, last lines\n{log.read_text(errors='replace')[-4000:]}" for log in self._logs]
        return RankFailedError("\n".join([problem, *logs]))

    def close(self, kindly: bool = True) -> None:
        """End the ranks: let them leave their process group together, and kill what remains."""
        self.alive = False
        if kindly:
            for pipe in self._pipes:
                pipe.send_bytes(pickle.dumps(None))
            for process in self._processes:
                process.join(timeout=15)
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        # Jobs may start DeepSpeed without our engine, which would have done this.
        for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self._port}_*"):
            leftover.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(rank: int, world_size: int, port: int, pipe: Connection, log: str) -> None:
    """What a rank does: answer jobs until told to leave."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.register(DUMP_STACKS, file=sys.stderr, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    while True:
        request = pickle.loads(pipe.recv_bytes())
        if request is None:
            break
        job, arguments = request
        random.seed(rank)  # nothing may rely on ranks drawing the same by themselves
        try:
            answer = (False, job(**arguments))
        except BaseException:
            answer = (True, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
