"""Looking for settings: the best for a given cluster, the smallest cluster that fits, and what would make a run fit.

Candidates are all combinations of what a user may set without changing what is trained: expert-parallel size, ZeRO
stage, micro-batch and recomputation policy. A candidate must divide (experts by EP, ranks by EP, the global batch by
ranks x micro-batch) and fit, while it starts and while it trains, on the device and in its share of the node's memory;
the fastest by ``roofline.py`` wins. The optimizer is in host memory where the run has it there; moving it is a remedy,
not a choice: it is slow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.planning.gpus import Gpu
from launch.planning.memory import MemoryPlan, plan_memory
from launch.planning.roofline import StepTime, step_time
from launch.planning.run import PlannedRun, Remat

_POLICIES: tuple[Remat, ...] = ("none", "loop", "routes", "dispatch", "sqrt")
_USABLE = 0.97  # of a GPU's memory: drivers keep some


@dataclass(frozen=True)
class Candidate:
    """Settings, and what the plan says of them."""

    run: PlannedRun
    memory: MemoryPlan
    time: StepTime

    def describe(self) -> str:
        """Its settings in one line."""
        run = self.run
        offload = ", optimizer in host memory" if run.offload_optimizer else ""
        return (
            f"EP {run.expert_parallel_size}, ZeRO {run.zero_stage}, micro-batch {run.micro_batch_size}, "
            f"remat {run.remat}{offload}"
        )


def usable_bytes(gpu: Gpu) -> float:
    """What a run may fill."""
    return gpu.memory_bytes * _USABLE


def divides(run: PlannedRun) -> bool:
    """Whether experts, ranks and batch divide as they must."""
    size, experts = run.expert_parallel_size, run.model.n_experts
    together = run.micro_batch_size * run.ranks
    return run.ranks % size == 0 and (size == 1 or experts % size == 0) and run.global_batch_size % together == 0


def evaluate(run: PlannedRun, gpu: Gpu) -> Candidate | None:
    """``run`` with its plan, None where it does not fit."""
    memory = plan_memory(run)
    fits = memory.fits(usable_bytes(gpu), gpu.host_memory_bytes)
    return Candidate(run, memory, step_time(run, gpu)) if fits else None


def best(run: PlannedRun, gpu: Gpu) -> Candidate | None:
    """The fastest settings that fit ``run.ranks`` GPUs; None when none does."""
    fitting = filter(None, (evaluate(candidate, gpu) for candidate in _candidates(run)))
    return min(fitting, key=lambda candidate: candidate.time.seconds, default=None)


def smallest_cluster(run: PlannedRun, gpu: Gpu, most_nodes: int = 4096) -> Candidate | None:
    """The fastest settings on the fewest nodes, a power of two, on which anything fits."""
    nodes = 1
    while nodes <= most_nodes:
        found = best(replace(run, ranks=nodes * gpu.per_node), gpu)
        if found is not None:
            return found
        nodes *= 2
    return None


def remedies(run: PlannedRun, gpu: Gpu) -> list[str]:
    """What would make a run fit that does not: single changes that are enough, else pairs, else triples."""
    changes: list[tuple[str, dict[str, object]]] = []
    if run.micro_batch_size > 1:
        changes.append(("parallel.micro_batch_size = 1", {"micro_batch_size": 1}))
    changes += [(f"loop.remat = {policy}", {"remat": policy}) for policy in ("loop", "sqrt") if policy != run.remat]
    if run.zero_stage < 3:
        changes.append(("parallel.zero_stage = 3", {"zero_stage": 3}))
    elif not run.zero_init:
        changes.append(("parallel.zero_init = true", {"zero_init": True}))
    size = run.expert_parallel_size * 2
    while run.model.n_experts and run.model.n_experts % size == 0 and run.ranks % size == 0:
        changes.append((f"parallel.expert_parallel_size = {size}", {"expert_parallel_size": size}))
        size *= 2
    if run.muon:
        changes.append(('optim.kind = "adamw"', {"muon": False}))
    else:
        changes.append(('parallel.offload_optimizer = "cpu"', {"offload_optimizer": True}))
    found: list[str] = []
    for count in (1, 2, 3):
        for chosen in itertools.combinations(changes, count):
            fields = {key: value for _, change in chosen for key, value in change.items()}
            if len(fields) < count:
                continue  # two values of one setting
            changed = replace(run, **fields)  # type: ignore[arg-type]
            if divides(changed) and evaluate(changed, gpu) is not None:
                found.append(" and ".join(name for name, _ in chosen))
        if found:
            break
    return found[:4]


def _candidates(run: PlannedRun) -> Iterator[PlannedRun]:
    sizes = [size for size in _powers(run.model.n_experts or 1) if run.ranks % size == 0]
    batches = _powers(run.global_batch_size // run.ranks) if run.global_batch_size >= run.ranks else []
    stages = (3,) if run.zero_init or run.offload_parameters or run.muon else (1, 2, 3)
    for size, stage, batch, policy in itertools.product(sizes, stages, batches, _POLICIES):
        if policy in ("routes", "dispatch") and (size == 1 or run.model.n_experts == 0):
            continue
        candidate = replace(
            run,
            expert_parallel_size=size,
            zero_stage=stage,
            micro_batch_size=batch,
            remat=policy,
            remat_once=policy != "none",
        )
        if divides(candidate):
            yield candidate


def _powers(limit: int) -> list[int]:
    """Powers of two up to ``limit``."""
    return [1 << exponent for exponent in range(max(limit, 1).bit_length())]
