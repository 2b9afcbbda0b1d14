"""A plan as a value: everything the table, the JSON and the picture show, worked out once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from launch.planning.flops import training_flops
from launch.planning.gpus import Gpu
from launch.planning.memory import MemoryPlan, plan_memory
from launch.planning.roofline import SECONDS_A_DAY, StepTime, step_time
from launch.planning.run import PlannedRun
from launch.planning.search import Candidate, best, divides, remedies, smallest_cluster, usable_bytes
from launch.planning.traffic import step_transfers
from launch.planning.weights import active_parameters, model_weights


@dataclass(frozen=True)
class Plan:
    """One run on one cluster. ``best`` and ``smallest`` are None where nothing fits or nobody asked."""

    run: PlannedRun
    gpu: Gpu
    price_per_gpu_hour: float | None
    memory: MemoryPlan
    time: StepTime
    best: Candidate | None = None
    smallest: Candidate | None = None
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether a rank's memory is enough to start and to train."""
        return self.memory.fits(usable_bytes(self.gpu), self.gpu.host_memory_bytes)

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.time.seconds * self.run.steps / SECONDS_A_DAY

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.run.ranks

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines: bytes, seconds, FLOPs a token."""
        run, weights = self.run, model_weights(self.run.model)
        nodes = -(-run.ranks // self.gpu.per_node)
        cost = None if self.price_per_gpu_hour is None else self.gpu_hours * self.price_per_gpu_hour
        return {
            "run": run.name,
            "gpu": self.gpu.name,
            "gpus": run.ranks,
            "nodes": nodes,
            "settings": _settings(run),
            "parameters": {**weights.by_part(), "total": weights.total, "active": active_parameters(run.model)},
            "memory": {
                "fits": self.fits,
                "usable": usable_bytes(self.gpu),
                "total": self.memory.total,
                "moment": self.memory.moment,
                "by_kind": self.memory.by_kind,
                "moments": self.memory.moments,
                "host": self.memory.host_bytes,
                "start": self.memory.start_bytes,
                "start_host": self.memory.start_host_bytes,
                "worst_dispatch": self.memory.worst_dispatch_bytes,
            },
            "flops_per_token": {part: asdict(own) for part, own in training_flops(run, run.mean_loops).items()},
            "transfers": [
                {
                    **asdict(transfer),
                    "network_bytes": transfer.over_network(self.gpu.per_node, run.expert_parallel_size),
                }
                for transfer in step_transfers(run, run.mean_loops)
            ],
            "step": {
                "seconds": self.time.seconds,
                "by_resource": self.time.by_resource,
                "tokens": run.step_tokens,
                "utilisation": self.time.utilisation,
                "tokens_per_day": self.time.tokens_per_day,
            },
            "whole_run": {"steps": run.steps, "days": self.days, "gpu_hours": self.gpu_hours, "cost": cost},
            "best": _candidate(self.best),
            "smallest": _candidate(self.smallest),
            "remedies": list(self.remedies),
        }


def make_plan(run: PlannedRun, gpu: Gpu, price_per_gpu_hour: float | None = None, *, search: bool = True) -> Plan:
    """The plan of ``run`` as it is set; with ``search`` also what would be better, smaller, or needed."""
    memory, time = plan_memory(run), step_time(run, gpu)
    plan = Plan(run, gpu, price_per_gpu_hour, memory, time)
    if not search:
        return plan
    wanted = () if plan.fits else tuple(remedies(run, gpu))
    return Plan(run, gpu, price_per_gpu_hour, memory, time, best(run, gpu), smallest_cluster(run, gpu), wanted)


def _settings(run: PlannedRun) -> dict[str, Any]:
    names = (
        *("zero_stage", "expert_parallel_size", "micro_batch_size", "remat", "remat_once", "remat_offload"),
        *("offload_optimizer", "offload_parameters", "sequence_length", "global_batch_size", "dtype_bytes"),
        *("mean_loops", "max_loops", "grad_loops", "loss_chunk_tokens", "zero_init", "muon", "recipe", "fp8_dispatch"),
    )
    return {name: getattr(run, name) for name in names} | {
        "grad_accum_steps": run.grad_accum_steps,
        "divides": divides(run),
    }


def _candidate(found: Candidate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "gpus": found.run.ranks,
        "settings": _settings(found.run),
        "memory": found.memory.total,
        "step_seconds": found.time.seconds,
        "utilisation": found.time.utilisation,
    }
