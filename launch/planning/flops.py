r"""Floating-point operations to train on one token, by part: forward, backward, recomputation.

    a matrix of I x O      2 I O forward, 4 I O backward (its input's gradient, and its own)
    attention              2 H (d_qk + d_v) a key forward, 2 H (3 d_qk + 2 d_v) backward: a flash kernel computes
                           its scores again
    recomputation          one more forward of what is checkpointed, without its last matrix (nothing reads its output)
    sqrt                   nearly two more forwards of the loops

A causal query sees (S + 1) / 2 keys on average, one with a window W of S about W - W^2 / (2 S). Loops without a
gradient cost a forward. Norms, gates, sorting and softmax are left out, as in ``torch.utils.flop_counter``, which
``tests/launch/planning/test_flops.py`` holds this to; kernels that compute whole squares of scores, as that counter
supposes, are ``whole_squares``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launch.planning.run import PlannedRun
from launch.planning.weights import Weight, WeightGroup, model_weights
from model.config import IceConfig

_WITHOUT_PRODUCT = ("scale_curve", "loops.weight")  # of a loop, not of a token


@dataclass(frozen=True)
class Flops:
    """Of one token; adds up, and scales."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0

    @property
    def total(self) -> float:
        """What the machine executes."""
        return self.forward + self.backward + self.recompute

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor, self.recompute * factor)


def training_flops(
    run: PlannedRun, loops: int, *, whole_squares: bool = False, only: Callable[[Weight], bool] = lambda weight: True
) -> dict[str, Flops]:
    """FLOPs a token of a step of ``loops`` loops, by part of the model; tokens of all micro-batches cost the same.

    ``only``: whose products count, of the blocks' matrices.
    """
    config, weights = run.model, model_weights(run.model)
    reads = 1 + run.extra_reads
    flops = {part: Flops() for part in ("prelude", "core matrices", "core experts", "core attention", "coda", "head")}
    for part, blocks, passes in (("prelude", weights.prelude, 1), ("coda", weights.coda, reads)):
        for layer, block in enumerate(blocks):
            own = _matrices(block, 1.0, only, skip_last=run.remat_once and not config.sandwich_norm)
            keys = _keys(run.sequence_length, config.window(layer), whole_squares)
            own = own + _attention(config, keys)
            flops[part] += _with_recomputation(own, 1 if run.remat_once else 0) * passes
            if part == "coda" and run.probes:
                flops[part] += Flops(forward=own.forward * run.probes)
    for core, (n_loops, kept) in zip(weights.cores, run.loops_of_scales(loops), strict=True):
        for loop in range(n_loops):
            recomputed = run.recomputed_loops(kept) / kept if loop >= n_loops - kept else None
            for part, own in _core_loop(run, core, loop, whole_squares, only).items():
                flops[part] += Flops(own.forward) if recomputed is None else _with_recomputation(own, recomputed)
    if len(weights.cores) > 1:
        mixing = 2 * len(weights.cores) * config.dim
        flops["fusion"] = _matrices(weights.fusion, 1.0, only) + Flops(mixing, 2 * mixing)
    logits = 2 * config.vocab_size * config.dim
    flops["head"] = Flops(logits, 2 * logits, 0 if run.loss_chunk_tokens is None else logits) * reads
    if run.probes:
        flops["head"] += Flops(forward=logits * run.probes)
        flops["depth heads"] = _matrices(weights.depth_heads, 1.0, only)
    return flops


def total_flops(parts: dict[str, Flops]) -> Flops:
    """The sum over parts."""
    return sum(parts.values(), Flops())


def model_flops(parts: dict[str, Flops]) -> float:
    """What utilisation is measured in: forward and backward. Recomputation earns nothing."""
    return sum(own.forward + own.backward for own in parts.values())


def _core_loop(
    run: PlannedRun, core: WeightGroup, loop: int, whole_squares: bool, only: Callable[[Weight], bool]
) -> dict[str, Flops]:
    """One loop of one scale's core, ``recompute`` being what one recomputation costs."""
    config = run.model
    share = config.n_experts_per_tok / config.n_experts if config.n_experts else 0.0
    matrices = tuple(w for w in core.weights if not w.expert)
    skip = not config.sandwich_norm and (config.n_experts == 0 or config.n_shared_experts > 0)
    attention = Flops()
    for layer in range(config.recurrent_layers):
        window = config.window(loop * config.recurrent_layers + layer)
        attention += _attention(config, _keys(run.sequence_length, window, whole_squares))
        if config.attn_type == "moda_v2" and not whole_squares:  # its own kernel is no matrix product
            attention += _attention(config, min(loop, config.moda_history_window))
        if config.kv_policy == "gated" and loop > 0:
            attention += _attention(config, _keys(run.sequence_length, config.kv_gate_window, whole_squares))
    if config.kv_policy == "gated" and config.attn_type == "mla" and loop > 0:
        expanded = 2 * config.kv_lora_rank * config.n_heads * (config.qk_nope_head_dim + config.v_head_dim)
        attention += Flops(expanded, 2 * expanded, expanded) * config.recurrent_layers
    return {
        "core matrices": _matrices((WeightGroup("", matrices),), 1.0, only, skip_last=skip),
        "core experts": _matrices((WeightGroup("", tuple(w for w in core.weights if w.expert)),), share, only),
        "core attention": attention,
    }


def _multiplies(weight: Weight) -> bool:
    return len(weight.shape) >= 2 and not weight.name.endswith(_WITHOUT_PRODUCT)


def _matrices(
    groups: tuple[WeightGroup, ...], share: float, only: Callable[[Weight], bool], skip_last: bool = False
) -> Flops:
    """Products with every matrix, ``share`` of it used by a token; ``recompute`` leaves out the last when told."""
    used = [weight for group in groups for weight in group.weights if _multiplies(weight)]
    forward = sum(2 * weight.elements * share for weight in used if only(weight))
    final = next((w for w in reversed(used) if "adapters" not in w.name), None) if skip_last else None
    last = 2 * final.elements if final is not None and only(final) else 0
    return Flops(forward, 2 * forward, forward - last)


def _attention(config: IceConfig, keys: float) -> Flops:
    value_dim = config.v_head_dim if config.attn_type == "mla" else config.head_dim
    forward = 2 * config.n_heads * (config.qk_head_dim + value_dim) * keys
    backward = 2 * config.n_heads * (3 * config.qk_head_dim + 2 * value_dim) * keys
    return Flops(forward, backward, forward)


def _keys(context: int, window: int | None, whole_squares: bool) -> float:
    """Keys a query sees, on average over its position."""
    if whole_squares:
        return context
    if window is None or window >= context:
        return (context + 1) / 2
    return window - window * (window - 1) / (2 * context)


def _with_recomputation(own: Flops, times: float) -> Flops:
    return Flops(own.forward, own.backward, own.recompute * times)
