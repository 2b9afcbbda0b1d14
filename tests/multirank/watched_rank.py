"""A rank of a toy run under the watchdog, without DeepSpeed: ``watched_rank.py RANK RANKS PORT RUN FAULT CULPRIT``.

It sums numbers over the ranks, a step every 50 ms. From step 20 on the rank CULPRIT does what FAULT says.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from launch.environment import Place
from pretrain.config import WatchdogSection
from pretrain.fault_log import FaultLog
from pretrain.preemption import StopRequest
from pretrain.watchdog import Watchdog

LIMITS = WatchdogSection(
    heartbeat_seconds=0.25, silence_seconds=5, factor=10, floor_seconds=9, ceiling_seconds=60
)  # fmt: skip


def sleeps_in_python() -> None:
    """What the stacks must show."""
    time.sleep(1000)


def misbehave(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "sleeps":
        sleeps_in_python()
    if fault == "raises":
        raise ValueError("a mistake of this rank's own")


def main() -> int:
    rank, ranks, port = map(int, sys.argv[1:4])
    run, fault, culprit = Path(sys.argv[4]), sys.argv[5], int(sys.argv[6])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    stop = StopRequest()
    dist.init_process_group("gloo")
    hosts = [f"node{number}" for number in range(ranks)]
    watchdog = Watchdog(LIMITS, Place(rank, ranks), hosts, "session", run, FaultLog(run, rank))
    store = distributed_c10d.PrefixStore("ice", distributed_c10d._get_default_store().clone())
    watchdog.start(store, stop)
    dist.barrier()
    try:
        for step in range(2000):
            with watchdog.phase("step"):
                if step == 20 and rank == culprit:
                    misbehave(fault)
                heard = torch.tensor(float(stop.is_set()))
                dist.all_reduce(heard)
                time.sleep(0.05)
            print(f"step {step}", flush=True)
            if heard == ranks:
                break
        with watchdog.phase("evaluation"):
            time.sleep(LIMITS.floor_seconds + 3)
    except RuntimeError:
        watchdog.blame()
        return 4  # nobody else was to blame
    except ValueError as error:
        watchdog.fail(1, str(error))
        return 1
    watchdog.leave()
    dist.barrier()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)
