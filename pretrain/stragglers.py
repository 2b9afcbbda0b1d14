"""Which rank is slow? The one that is slow alone.

A step takes the same time on every rank, because they wait for each other, layer by layer under ZeRO-3: the step time
names nobody, and time outside collectives means nothing where kernels run asynchronously. So every ``every`` steps each
rank times, by itself, a few matrix products on the device that it trains on, and the times are gathered. A throttled
GPU, a core shared with another job, a node with a wrong power cap show there; a slow link does not (the preflight's
all-reduce finds those), nor slow storage (``data_wait_seconds`` in the metrics).

A rank is slow when its time exceeds ``factor`` times the median over ranks; it is named when it was in ``times``
gatherings one after the other. Nothing is done to it: whether to go on without that host is a person's decision, or the
next preflight's. Cost: a few milliseconds every ``every`` steps. The generators of random numbers are not touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from pretrain.config import StragglerSection
from pretrain.engine import TrainingEngine
from pretrain.fault_log import FaultLog

REPETITIONS = 5
SIZE = {"cpu": 256}  # of the square matrices: 1 ms or so
SIZE_ON_ACCELERATORS = 4096


def time_products(device: torch.device) -> float:
    """Median seconds of a matrix product on ``device``, alone."""
    size = SIZE.get(device.type, SIZE_ON_ACCELERATORS)
    matrix = torch.ones(size, size, device=device)
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        torch.mm(matrix, matrix)[0, 0].item()  # reading a number waits for the device
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def slow_ranks(seconds: list[float], factor: float) -> list[int]:
    """Ranks whose time exceeds ``factor`` times the median of all."""
    limit = factor * median(seconds)
    return [rank for rank, value in enumerate(seconds) if value > limit]


class StragglerCheck:
    """Counts how often each rank was slow; collective at the steps that are multiples of ``every``."""

    def __init__(
        self,
        section: StragglerSection,
        engine: TrainingEngine,
        hosts: list[str],
        faults: FaultLog,
        say: Callable[[str], None],
        probe: Callable[[torch.device], float] = time_products,
    ) -> None:
        self.section, self.engine, self.hosts = section, engine, hosts
        self.faults, self.say, self._probe = faults, say, probe
        self._slow_in_row = [0] * len(hosts)

    def check(self, step: int) -> dict[str, float]:
        """Numbers for the metrics: the slowest rank and its time over the median; empty at other steps."""
        if self.section.every is None or step % self.section.every or len(self.hosts) == 1:
            return {}
        seconds = self.engine.gather_objects(self._probe(self.engine.device))
        slow = slow_ranks(seconds, self.section.factor)
        self._slow_in_row = [(times + 1) * (rank in slow) for rank, times in enumerate(self._slow_in_row)]
        worst = max(range(len(seconds)), key=seconds.__getitem__)
        ratio = seconds[worst] / median(seconds)
        for rank in slow:
            if self._slow_in_row[rank] == self.section.times:
                ratio_of_rank = seconds[rank] / median(seconds)
                self.say(f"step {step}: rank {rank} on {self.hosts[rank]} computes {ratio_of_rank:.1f} x slower")
                if self.engine.place.is_first:
                    self.faults.add(
                        "slow_rank", step=step, of_rank=rank, of_host=self.hosts[rank], times_slower=ratio_of_rank
                    )
        return {"slowest_rank": worst, "slowest_rank_over_median": ratio}
