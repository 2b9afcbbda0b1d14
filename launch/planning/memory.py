r"""How much memory a rank needs, by kind, at the moments of a step that can be its fullest.

Always there (ZeRO-3; b bytes a number of the dtype, P this rank's shard of all parameters):

    weights b P,  gradients b P,  fp32 master and two moments 12 P,  the bucket in which gradients are reduced

(of what Muon updates, master and momentum: 4 + b).

ZeRO-2 holds all weights, ZeRO-1 all weights and, in a step, all gradients; stage 0 everything. The moments:

    forward's end     gathered weights, loop states, logits and their log-softmax
    loss's backward   the same, and two gradients of the logits
    core's backward   gathered weights, one loop's activations and their gradients, and, while the loops of a leaf are
                      walked, the gradients of its whole local weights; logits live on in the step's output
    optimizer step    an fp32 copy of the largest sub-group's gradients and Adam's temporaries; or what Muon gathers

Building the engine has a peak of its own, ``start_bytes``, which must fit too.

``gathering.py`` says which weights are gathered when. A CPU has no caching allocator, so there the allowance is zero;
on a GPU it is a share of everything that comes and goes, and what CUDA and NCCL take before the first tensor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from launch.planning import muon
from launch.planning.activations import core_loop, dense_block, loop_state_bytes
from launch.planning.eight_bits import copies_bytes
from launch.planning.gathering import Placement, walked
from launch.planning.run import PlannedRun
from launch.planning.weights import model_weights

if TYPE_CHECKING:
    from model.config import IceConfig

_FRAGMENTATION = 0.05  # of what comes and goes
_CUDA_BYTES = 2.5 * 2**30  # context, cuBLAS and NCCL buffers

KINDS = (
    "weights, own",
    "weights, gathered",
    "gradients, own",
    "gradients, whole",
    "gradient bucket",
    "optimizer",
    "loop states",
    "activations",
    "logits",
    "allowance",
)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a rank at its fullest moment, by kind, and what it keeps in host memory."""

    moment: str
    by_kind: dict[str, float]
    host_bytes: float
    moments: dict[str, float]  # the total of each
    start_bytes: float  # on the device, while the engine is built, before the first step
    start_host_bytes: float  # in host memory meanwhile
    worst_dispatch_bytes: float  # more than planned, if every rank's tokens chose this rank's experts

    @property
    def total(self) -> float:
        """On the device, in a step."""
        return sum(self.by_kind.values())

    def fits(self, device_bytes: float, host_bytes: float) -> bool:
        """Whether so much memory is enough for a rank to start and to step."""
        starts = self.start_bytes <= device_bytes and self.start_host_bytes <= host_bytes
        return starts and self.total <= device_bytes and self.host_bytes <= host_bytes


def plan_memory(run: PlannedRun, *, on_gpu: bool = True) -> MemoryPlan:
    """The memory of a rank of ``run``; on a CPU, device and host are one, and nothing fragments."""
    static, host = _static(run)
    passing = _moments(run, on_gpu=on_gpu)
    totals = {}
    for moment, kinds in passing.items():
        if on_gpu:
            kinds["allowance"] = _CUDA_BYTES + _FRAGMENTATION * sum(kinds.values())
        totals[moment] = sum(static.values()) + sum(kinds.values())
    fullest = max(totals, key=lambda moment: totals[moment])
    by_kind = {
        kind: static.get(kind, 0.0) + passing[fullest].get(kind, 0.0)
        for kind in KINDS
        if kind in static or kind in passing[fullest]
    }
    states_on_host = _loop_states(run) if run.remat_offload else 0.0
    start, start_on_host = _start(run)
    if on_gpu:
        start += _CUDA_BYTES
    return MemoryPlan(
        fullest, by_kind, host + states_on_host, totals, start, start_on_host, worst_dispatch_bytes=_worst_dispatch(run)
    )


@dataclass(frozen=True)
class Elements:
    """Numbers of parameters that a rank has of a model: whole (its own experts of the routed ones), and as shards."""

    local: int
    shard_shared: int
    shard_experts: int
    local_shared: int
    after_core: int  # of coda, last norm and head
    largest_core: int
    largest_matrix: int
    largest_shared: int  # of what every rank builds whole

    @property
    def shard(self) -> int:
        """Its shard of everything."""
        return self.shard_shared + self.shard_experts


@functools.lru_cache(maxsize=1024)
def elements_of(config: IceConfig, placement: Placement) -> Elements:
    """Count them, once for each model and placement: a search asks often."""
    weights = model_weights(config)
    everything = list(weights.weights())
    shared = [weight for weight in everything if not weight.expert]
    experts = [weight for weight in everything if weight.expert]
    local, shard = placement.local_elements, placement.shard_elements
    return Elements(
        local=sum(map(local, everything)),
        shard_shared=sum(map(shard, shared)),
        shard_experts=sum(map(shard, experts)),
        local_shared=sum(map(local, shared)),
        after_core=sum(
            map(local, [w for group in (*chain(*weights.coda), weights.norm, weights.head) for w in group.weights])
        ),
        largest_core=max(sum(map(local, core.weights)) for core in weights.cores),
        # The engine splits gate from up.
        largest_matrix=max(
            local(weight) // (2 if weight.expert and "gate_up" in weight.name else 1)
            for core in weights.cores
            for weight in core.weights
        ),
        largest_shared=max(map(local, shared)),
    )


def own_elements(run: PlannedRun) -> int:
    """What this rank's optimizer steps."""
    elements = elements_of(run.model, run.placement)
    return elements.local if run.zero_stage == 0 else elements.shard


def _static(run: PlannedRun) -> tuple[dict[str, float], float]:
    """What never goes away, and what of it lies in host memory."""
    b, own, local = run.dtype_bytes, own_elements(run), elements_of(run.model, run.placement).local
    master = 0 if run.zero_stage == 0 and b == 4 else 4 * own
    # Muon keeps one moment, in the dtype.
    optimizer, gradients = float(master + 8 * own - (8 - b) * muon.shard_elements(run)), float(b * own)
    kept = float(b * (own if run.zero_stage == 3 else local))
    host = 0.0
    if run.offload_optimizer:
        host += optimizer + gradients + 4 * own  # and its fp32 gradients
        optimizer = gradients = 0.0
    if run.offload_parameters:
        host += kept
        kept = 0.0
    static = {"weights, own": kept, "optimizer": optimizer}
    if run.zero_stage == 3:  # the others make them anew in each backward
        static |= {"gradients, own": gradients, "gradient bucket": float(b * run.engine.reduce_bucket_size)}
    return static, host


def _loop_states(run: PlannedRun) -> float:
    """What the deepest step keeps of its loops, over all scales."""
    model, b = run.model, run.dtype_bytes
    total = 0.0
    for _, kept in run.loops_of_scales(run.max_loops):
        state = loop_state_bytes(model, b)
        if run.remat == "none":
            total += kept * core_loop(model, b).saved
            continue
        choices = model.recurrent_layers * model.n_experts_per_tok if model.n_experts else 0
        if run.remat in ("routes", "dispatch"):
            state += 4 * 8 * choices
        if run.remat == "dispatch" and run.expert_parallel_size > 1:
            there = model.dim + -(-model.dim // 128) if run.fp8_dispatch else b * model.dim  # as they travelled
            state += choices * (there + b * model.dim)
        total += run.kept_states(kept) * state
    return total * run.micro_tokens


def _before_core(run: PlannedRun) -> float:
    """Kept of prelude and embedding, a token; and the encoded input and its drive."""
    model, b = run.model, run.dtype_bytes
    block = b * model.dim if run.remat_once else dense_block(model, b).saved
    return model.prelude_layers * block + (8 + 2 * b) * model.dim


def _after_core(run: PlannedRun) -> float:
    """Kept of MSRD's gate, the coda and the last norm, a token: gone when the core's backward begins."""
    model, b = run.model, run.dtype_bytes
    block = b * model.dim if run.remat_once else dense_block(model, b).saved
    scales = len(model.msrd_scales)
    fusion = (3 * b + 8) * scales * model.dim if scales > 1 else 0
    return (model.coda_layers * block + (8 + b) * model.dim) * (1 + run.extra_reads) + fusion


def _moments(run: PlannedRun, *, on_gpu: bool) -> dict[str, dict[str, float]]:
    model, b, tokens = run.model, run.dtype_bytes, run.micro_tokens
    loop, dense = core_loop(model, b), dense_block(model, b)
    states = 0.0 if run.remat_offload and on_gpu else _loop_states(run)
    before = _before_core(run) * tokens
    once = before + _after_core(run) * tokens
    logits = float(model.vocab_size * tokens * (1 + run.extra_reads + run.probes))
    chunked = run.loss_chunk_tokens is not None
    chunk = float(model.vocab_size * min(tokens, run.loss_chunk_tokens or tokens))
    held = 0.0 if chunked else b * logits
    widened = 4.0 if b < 4 else 0.0  # the fp32 copy of half-precision logits
    forward, backward = _live(run, "forward"), _live(run, "backward")
    elements = elements_of(model, run.placement)
    recomputed = 0.0 if run.remat == "none" else loop.saved
    eight_bits = copies_bytes(run)
    moments = {
        "forward's end": {
            "weights, gathered": forward,
            "loop states": states,
            "activations": once,
            "logits": chunk * (4 + widened) if chunked else (b + 4 + widened) * logits,
        },
        "loss's backward": {
            "weights, gathered": forward,
            "loop states": states,
            "activations": once,
            "logits": chunk * (4 + b + widened) if chunked else held + (12 + widened) * logits,
            # Chunks add up the head's gradient in fp32.
            "gradients, whole": (4.0 + (b if b < 4 else 0)) * model.vocab_size * model.dim if chunked else 0.0,
        },
        "core's backward": {
            "weights, gathered": backward,
            "loop states": states,
            "activations": before + (recomputed + loop.backward_passing) * tokens + eight_bits,
            "gradients, whole": b * (elements.largest_core + elements.largest_matrix),
            "logits": held,
        },
        "forward of a loop": {
            "weights, gathered": forward,
            "loop states": states,
            "activations": before + (recomputed + loop.forward_passing) * tokens + eight_bits,
        },
        "dense block's backward": {
            "weights, gathered": backward,
            "loop states": states,
            "activations": once + ((dense.saved if run.remat_once else 0) + dense.backward_passing) * tokens,
            "logits": held,
        },
    }
    if run.zero_stage < 3:
        _add_growing_gradients(run, moments)
    moments["optimizer step"] = _step(run)
    return moments


def _add_growing_gradients(run: PlannedRun, moments: dict[str, dict[str, float]]) -> None:
    """Below ZeRO-3 gradients stay as they come: the head's and coda's before the core's, the prelude's last."""
    elements, b = elements_of(run.model, run.placement), run.dtype_bytes
    share = run.ranks if run.zero_stage == 2 else 1
    for moment, so_far in (
        ("core's backward", elements.after_core),
        ("dense block's backward", elements.local if run.zero_stage < 2 else elements.shard * share),
    ):
        kinds = moments[moment]
        kinds["gradients, own"] = b * so_far / share
        if run.zero_stage:
            kinds["gradient bucket"] = float(b * min(run.engine.reduce_bucket_size, elements.local))


def _live(run: PlannedRun, phase: str) -> float:
    """Bytes of weights gathered at the fullest of ``phase``."""
    if run.zero_stage != 3:
        return 0.0
    account = walked(run.model, run.placement, run.engine, run.remat_once, run.extra_reads, run.probes)
    most = max(elements for (at, _), elements in account.live_elements.items() if at == phase)
    return float(run.dtype_bytes * most)


def _step(run: PlannedRun) -> dict[str, float]:
    """ZeRO-3 steps sub-groups of its shard one after the other; experts and the rest are never in one."""
    if run.offload_optimizer:
        return {"weights, gathered": 0.0}
    elements = elements_of(run.model, run.placement)
    if run.zero_stage == 0:
        return {"gradients, own": float(run.dtype_bytes * elements.local), "optimizer": 4.0 * elements.local}
    if run.zero_stage == 3:
        group = max(elements.shard_shared, elements.shard_experts)
        return {"optimizer": max(4.0 * min(group, run.engine.sub_group_size), muon.passing_bytes(run))}
    copied = 4 * elements.shard if run.dtype_bytes < 4 else 0
    return {
        "gradients, own": float(run.dtype_bytes * elements.shard),
        "optimizer": float(copied),
    }


def _start(run: PlannedRun) -> tuple[float, float]:
    """On the device, and in host memory, while the engine is built (``pretrain/expert_start.py``).

    With ``zero_init`` a rank has the shards of what is built, and beside them one shared matrix whole, or at the end
    its own experts of one layer, the last of whose three stacks are not sharded yet, and an expert's matrix in fp32.
    Without it every rank builds the whole model, but only its own experts of it, in fp32 in host memory, and moves it
    to the device in its dtype.
    """
    model, b, elements = run.model, run.dtype_bytes, elements_of(run.model, run.placement)
    if not run.zero_init:
        return float(b * elements.local), 4.0 * elements.local
    own = 3 * model.n_experts // run.expert_parallel_size * model.expert_dim * model.dim
    sharded = own * run.expert_parallel_size / run.ranks
    experts = elements.shard - 2 / 3 * sharded + own
    building = float(b * max(experts, elements.shard_shared + elements.largest_shared))
    return building + 4.0 * (model.expert_dim * model.dim if own else 0), 0.0


def _worst_dispatch(run: PlannedRun) -> float:
    """Rows beyond an even share, in one layer: dropless routing promises to take them all."""
    model, size = run.model, run.expert_parallel_size
    if model.n_experts == 0:
        return 0.0
    a_token = min(model.n_experts_per_tok, model.n_experts // size)
    rows = run.micro_tokens * (size * a_token - model.n_experts_per_tok)
    return float(rows * run.dtype_bytes * (4 * model.dim + 6 * model.expert_dim))
