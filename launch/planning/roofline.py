r"""How long an optimizer step takes: each resource's work over its rate, and what of it hides behind what.

    arithmetic     FLOPs / (peak x efficiency of the kind of product)
    memory         bytes that norms, activations and sorting move through HBM, which no product hides
    parameters     gathers and reductions over NVLink and network; a share runs while products do
    experts        all-to-alls, which the next product waits for: nothing hides them
    optimizer      every state read and written once; over PCIe and by the host's cores when offloaded; Muon's rounds
                   of Newton-Schulz and its gathers, one after the other

An FP8 recipe's products run at the rate of eight bits with the same efficiency, and rounding their operands is
``memory`` (``eight_bits.py``).

A roofline is an upper bound made honest by stated efficiencies (:class:`Efficiency`). They are assumptions from what
others report on such machines, not measurements of this project (no GPU has run it): change them when you have some.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.activations import core_loop, dense_block
from launch.planning.eight_bits import eight_bits
from launch.planning.flops import Flops, model_flops, total_flops, training_flops
from launch.planning.gpus import Gpu
from launch.planning.memory import own_elements
from launch.planning.muon import flops_in_turn, shard_elements
from launch.planning.run import PlannedRun
from launch.planning.traffic import Transfer, step_transfers

SECONDS_A_DAY = 86400


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet's rates that are expected, and of communication that hides."""

    dense: float = 0.60  # large matrix products
    grouped: float = 0.45  # experts: many small products in one
    attention: float = 0.45  # a flash kernel, both ways
    hbm: float = 0.75
    nvlink: float = 0.75
    network: float = 0.75
    overlap: float = 0.70  # of parameter traffic, behind arithmetic
    host_adam_bytes_per_second: float = 25e9  # a GPU's part of its host's memory bandwidth


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by what is waited for, and what follows from them."""

    by_resource: dict[str, float]
    tokens_per_step: int
    flops_per_token: Flops
    utilisation: float  # model FLOPs over the peak

    @property
    def seconds(self) -> float:
        """Of one optimizer step."""
        return sum(self.by_resource.values())

    @property
    def tokens_per_day(self) -> float:
        """Of the whole cluster."""
        return self.tokens_per_step / self.seconds * SECONDS_A_DAY


def step_time(run: PlannedRun, gpu: Gpu, efficiency: Efficiency | None = None) -> StepTime:
    """The time of a step of mean depth on ``run.ranks`` of ``gpu``."""
    rates = efficiency or Efficiency()
    parts = training_flops(run, run.mean_loops)
    tokens_of_rank = run.step_tokens / run.ranks
    peak = gpu.bf16_flops if run.dtype_bytes == 2 else gpu.bf16_flops / 2
    by_kind = {"core experts": rates.grouped, "core attention": rates.attention}
    narrow = eight_bits(run, gpu)
    arithmetic = sum(
        (own.total - faster + (faster * peak / gpu.fp8_flops if faster else 0.0))
        * (tokens_of_rank / (peak * by_kind.get(part, rates.dense)))
        for part, own, faster in ((part, own, narrow.flops.get(part, 0.0)) for part, own in parts.items())
    )
    transfers = step_transfers(run, run.mean_loops)
    parameters = _wire_seconds(run, gpu, rates, [t for t in transfers if not t.kind.startswith(("expert", "Muon"))])
    hbm = gpu.hbm_bytes_per_second * rates.hbm
    experts = _wire_seconds(run, gpu, rates, [t for t in transfers if t.kind.startswith("expert")])
    exposed = max(parameters * (1 - rates.overlap), parameters - arithmetic)
    by_resource = {
        "arithmetic": arithmetic,
        "memory": (_moved_bytes(run) * tokens_of_rank + narrow.rounding_bytes) / hbm,
        "parameter traffic": exposed,
        "expert traffic": experts,
        "optimizer": _optimizer_seconds(run, gpu, rates)
        + flops_in_turn(run) / (peak * rates.dense)
        + _wire_seconds(run, gpu, rates, [t for t in transfers if t.kind.startswith("Muon")]),
    }
    seconds = sum(by_resource.values())
    utilisation = model_flops(parts) * tokens_of_rank / (seconds * peak)
    return StepTime(by_resource, run.step_tokens, total_flops(parts), utilisation)


def _wire_seconds(run: PlannedRun, gpu: Gpu, rates: Efficiency, transfers: list[Transfer]) -> float:
    """NVLink and network carry parts of the same transfer at once; the slower one is waited for."""
    seconds = 0.0
    for transfer in transfers:
        network = transfer.over_network(gpu.per_node, run.expert_parallel_size)
        nvlink = max(transfer.sent_bytes - network, 0.0)
        seconds += max(
            network / (gpu.network_bytes_per_second * rates.network),
            nvlink / (gpu.nvlink_bytes_per_second * rates.nvlink),
        )
    return seconds


def _moved_bytes(run: PlannedRun) -> float:
    """Bytes a token's activations move through HBM: written once and read once forward, and twice that backward."""
    model, b = run.model, run.dtype_bytes
    loop, dense = core_loop(model, b), dense_block(model, b)
    moved = 0.0
    for loops, kept in run.loops_of_scales(run.mean_loops):
        moved += 2 * (loop.saved + loop.forward_passing) * (loops + 2 * kept + run.recomputed_loops(kept))
    blocks = model.prelude_layers + model.coda_layers * (1 + run.extra_reads)
    moved += 2 * (dense.saved + dense.forward_passing) * blocks * (4 if run.remat_once else 3)
    return moved + 4 * 4 * model.vocab_size * (1 + run.extra_reads)


def _optimizer_seconds(run: PlannedRun, gpu: Gpu, rates: Efficiency) -> float:
    own, b = own_elements(run), run.dtype_bytes
    states = own * (2 * 12 + 2 * b) - 2 * (8 - b) * shard_elements(run)  # read and written
    if not run.offload_optimizer:
        return states / (gpu.hbm_bytes_per_second * rates.hbm)
    return states / rates.host_adam_bytes_per_second + own * 2 * b / gpu.host_bytes_per_second
