r"""How much memory a rank needs, by kind, at the moments of a step that can be its fullest.

Always there (ZeRO-3; b bytes a number of the dtype, P this rank's shard of all parameters):

    weights b P,  gradients b P,  fp32 master and two moments 12 P,  the bucket in which gradients are reduced

ZeRO-2 holds all weights, ZeRO-1 all weights and, in a step, all gradients; stage 0 everything. The moments:

    forward's end     gathered weights, loop states, logits and their log-softmax
    loss's backward   the same, and two gradients of the logits
    core's backward   gathered weights, one loop's activations and their gradients, and, while the loops of a leaf are
                      walked, the gradients of its whole local weights; logits live on in the step's output
    optimizer step    an fp32 copy of the largest sub-group's gradients and Adam's temporaries

``gathering.py`` says which weights are gathered when. A CPU has no caching allocator, so there the allowance is zero;
on a GPU it is a share of everything that comes and goes, and what CUDA and NCCL take before the first tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.planning.activations import core_loop, dense_block, loop_state_bytes
from launch.planning.gathering import gather, walk
from launch.planning.run import PlannedRun
from launch.planning.weights import ModelWeights, WeightGroup, model_weights

_FRAGMENTATION = 0.05  # of what comes and goes
_CUDA_BYTES = 2.5 * 2**30  # context, cuBLAS and NCCL buffers
_LOSS_CHUNK_TOKENS = 1024
_ADAM_TEMPORARIES = 8  # bytes an element: two fp32 tensors

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

    @property
    def total(self) -> float:
        """On the device."""
        return sum(self.by_kind.values())


def plan_memory(run: PlannedRun, *, on_gpu: bool = True) -> MemoryPlan:
    """The memory of a rank of ``run``; on a CPU, device and host are one, and nothing fragments."""
    weights = model_weights(run.model)
    static, host = _static(run, weights)
    passing = _moments(run, weights, on_gpu=on_gpu)
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
    return MemoryPlan(fullest, by_kind, host + states_on_host, totals)


def _local_elements(run: PlannedRun, weights: ModelWeights) -> int:
    return sum(run.placement.local_elements(weight) for weight in weights.weights())


def own_elements(run: PlannedRun, *, experts: bool | None = None) -> int:
    """This rank's shard of all parameters, what its optimizer steps; of the routed experts' only, or all but those."""
    placement = run.placement
    count = placement.local_elements if run.zero_stage == 0 else placement.shard_elements
    return sum(count(weight) for weight in model_weights(run.model).weights() if experts in (None, weight.expert))


def _static(run: PlannedRun, weights: ModelWeights) -> tuple[dict[str, float], float]:
    """What never goes away, and what of it lies in host memory."""
    b, own, local = run.dtype_bytes, own_elements(run), _local_elements(run, weights)
    master = 0 if run.zero_stage == 0 and b == 4 else 4 * own
    optimizer, gradients = float(master + 8 * own), float(b * own)
    kept = float(b * (own if run.zero_stage == 3 else local))
    host = 0.0
    if run.offload_optimizer:
        host += optimizer + gradients + 4 * own  # and its fp32 gradients
        optimizer = gradients = 0.0
    if run.offload_parameters:
        host += kept
        kept = 0.0
    bucket = 0.0 if run.zero_stage == 0 else float(b * run.engine.reduce_bucket_size)
    if run.zero_stage == 0:
        gradients = 0.0  # they come with the backward: "gradients, whole"
    static = {
        "weights, own": kept,
        "gradients, own": gradients,
        "gradient bucket": bucket,
        "optimizer": optimizer,
    }
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
        if run.remat == "sqrt":
            segment = 1
            while segment * segment < kept:
                segment += 1
            total += (-(-kept // segment) + segment) * state
            continue
        choices = model.recurrent_layers * model.n_experts_per_tok if model.n_experts else 0
        if run.remat in ("routes", "dispatch"):
            state += 4 * 8 * choices
        if run.remat == "dispatch" and run.expert_parallel_size > 1:
            state += 2 * choices * b * model.dim
        total += kept * state
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


def _moments(run: PlannedRun, weights: ModelWeights, *, on_gpu: bool) -> dict[str, dict[str, float]]:
    model, b, tokens = run.model, run.dtype_bytes, run.micro_tokens
    loop, dense = core_loop(model, b), dense_block(model, b)
    states = 0.0 if run.remat_offload and on_gpu else _loop_states(run)
    before = _before_core(run) * tokens
    once = before + _after_core(run) * tokens
    logits = float(model.vocab_size * tokens * (1 + run.extra_reads + run.probes))
    chunk = float(model.vocab_size * min(tokens, _LOSS_CHUNK_TOKENS))
    held = 0.0 if run.chunked_loss else b * logits
    widened = 4.0 if b < 4 else 0.0  # the fp32 copy of half-precision logits
    live = _live(run, weights)
    leaves = [_leaf(run, core) for core in weights.cores]
    biggest = max(leaves)
    recomputed = 0.0 if run.remat == "none" else loop.saved
    moments = {
        "forward's end": {
            "weights, gathered": live("forward"),
            "loop states": states,
            "activations": once,
            "logits": chunk * (b + 4 + widened) if run.chunked_loss else (b + 4 + widened) * logits,
        },
        "loss's backward": {
            "weights, gathered": live("forward"),
            "loop states": states,
            "activations": once,
            "logits": chunk * (b + 12) if run.chunked_loss else held + (12 + widened) * logits,
        },
        "core's backward": {
            "weights, gathered": live("backward"),
            "loop states": states,
            "activations": before + (recomputed + loop.backward_passing) * tokens,
            "gradients, whole": b * (biggest + _largest_matrix(run, weights)),
            "logits": held,
        },
        "forward of a loop": {
            "weights, gathered": live("forward"),
            "loop states": states,
            "activations": before + (recomputed + loop.forward_passing) * tokens,
        },
        "dense block's backward": {
            "weights, gathered": live("backward"),
            "loop states": states,
            "activations": once + ((dense.saved if run.remat_once else 0) + dense.backward_passing) * tokens,
            "logits": held,
        },
    }
    if run.zero_stage in (0, 1):  # whole gradients until the step
        for moment in moments.values():
            moment["gradients, whole"] = moment.get("gradients, whole", 0.0) + b * _local_elements(run, weights)
    moments["optimizer step"] = _step(run)
    return moments


def _live(run: PlannedRun, weights: ModelWeights):  # type: ignore[no-untyped-def]
    """A function from a phase to the bytes of weights gathered at its fullest."""
    if run.zero_stage != 3:
        return lambda phase: 0.0
    uses = walk(weights, recompute_once=run.remat_once, extra_reads=run.extra_reads, probes=run.probes)
    account = gather(uses, run.placement, run.engine)

    def live(phase: str) -> float:
        most = max(elements for (at, _), elements in account.live_elements.items() if at == phase)
        return float(run.dtype_bytes * most)

    return live


def _leaf(run: PlannedRun, core: WeightGroup) -> int:
    return sum(run.placement.local_elements(weight) for weight in core.weights)


def _largest_matrix(run: PlannedRun, weights: ModelWeights) -> int:
    """A new contribution to a gradient exists beside the sum it is added to; the engine splits gate from up."""
    matrices = (weight for core in weights.cores for weight in core.weights)
    return max(
        run.placement.local_elements(weight) // (2 if weight.expert and "gate_up" in weight.name else 1)
        for weight in matrices
    )


def _step(run: PlannedRun) -> dict[str, float]:
    """ZeRO-3 steps sub-groups of its shard one after the other; experts and the rest are never in one."""
    if run.offload_optimizer:
        return {"weights, gathered": 0.0}
    group = max(own_elements(run, experts=True), own_elements(run, experts=False))
    if run.zero_stage == 3:
        group = min(group, run.engine.sub_group_size)
    return {"optimizer": float((4 + _ADAM_TEMPORARIES) * group)}
