"""How many parameters a configuration has, how many a token uses, and what a token costs; counted on the meta device.

The numbers come from the model itself (built without memory), so they cannot drift from the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.attention.cache import slot_windows
from model.attention.mlca import Pooling
from model.attention.slot import most_rows
from model.config import IceConfig
from model.depth import DepthPlan
from model.looped_lm import IceModel

# Which part of the count a parameter of the core belongs to, by what its name contains; the first match wins.
_CORE_PARTS = (
    ("core.fusion.", "core_fusion"),
    (".injection.", "injection"),
    (".halting.", "halting"),
    (".adapters.", "core_adapters"),
    (".attention.", "core_attention"),
    (".ffn.router.", "core_router"),
    (".ffn.experts.", "core_experts"),
    (".ffn.shared_experts.", "core_shared"),
    (".ffn.", "core_dense"),
)
# Parts of the core a token uses in full in every loop; of the experts it uses n_experts_per_tok.
_USED_EACH_LOOP = (
    "core_attention",
    "core_router",
    "core_shared",
    "core_dense",
    "core_adapters",
    "core_other",
    "injection",
    "halting",
)

# The parts a count is divided into, in the order a reader meets them.
PARTS = (
    "embedding",
    "prelude",
    "core_attention",
    "core_router",
    "core_experts",
    "core_shared",
    "core_dense",
    "core_adapters",
    "core_fusion",
    "core_other",
    "injection",
    "halting",
    "depth_heads",
    "coda",
    "final_norms",
    "head",
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. The ``PARTS`` sum to ``total``; a tied head counts 0, its matrix is the embedding's."""

    embedding: int
    prelude: int
    core_attention: int
    core_router: int
    core_experts: int
    core_shared: int
    core_dense: int
    core_adapters: int  # GDLoRA
    core_fusion: int  # the gate over MSRD's scales
    core_other: int  # norms, loop-step embedding, learned initial state
    injection: int
    halting: int
    depth_heads: int  # SLU; they advise generation and are no part of the logits, so no token "uses" them
    coda: int
    head: int
    final_norms: int  # the norm after the prelude and the one before the head
    total: int
    active_per_loop: int  # of one core (one scale of MSRD), used by one token in one loop
    active: int  # distinct parameters one token uses, whole embedding table and head included
    executed: int  # used by one token over all T loops: a looped one T times, of the embedding one row

    @property
    def core(self) -> int:
        """Everything inside the loop, of all scales."""
        in_full: int = sum(getattr(self, part) for part in _USED_EACH_LOOP)
        return self.core_experts + self.core_fusion + in_full


def meta_model(config: IceConfig) -> IceModel:
    """The model with shapes and no memory."""
    with torch.device("meta"):
        return IceModel(config)


def count_parameters(config: IceConfig, n_loops: int | None = None) -> ParameterCount:
    """Count ``config``'s parameters; ``executed`` is at ``n_loops``, by default ``config.max_loop_iters``."""
    n_loops = config.max_loop_iters if n_loops is None else n_loops
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in meta_model(config).named_parameters():
        counts[_part_of(name)] += parameter.numel()
    all_scales = sum(counts[part] for part in _USED_EACH_LOOP)
    if config.n_experts:
        all_scales += counts["core_experts"] * config.n_experts_per_tok // config.n_experts
    per_loop = all_scales // len(config.msrd_scales)
    outside = counts["prelude"] + counts["coda"] + counts["final_norms"] + counts["core_fusion"]
    head = counts["embedding"] if config.tie_embeddings else counts["head"]
    return ParameterCount(
        **counts,
        total=sum(counts.values()),
        active_per_loop=per_loop,
        active=counts["embedding"] + outside + counts["head"] + all_scales,
        executed=config.dim + outside + head + sum(loops_by_scale(config, n_loops)) * per_loop,
    )


def loops_by_scale(config: IceConfig, n_loops: int) -> list[int]:
    """Loops the core of each MSRD scale runs when the model runs ``n_loops``."""
    return [DepthPlan(n_loops).at_scale(scale).n_loops for scale in config.msrd_scales]


def _part_of(name: str) -> str:
    top = name.split(".")[0]
    match top:
        case "embed":
            return "embedding"
        case "prelude" | "coda" | "head" | "depth_heads":
            return top
        case "core":
            return next((part for needle, part in _CORE_PARTS if needle in name), "core_other")
        case _:
            return "final_norms"


def attention_flops_per_token(config: IceConfig, context: int, window: int | None = None, extra_keys: int = 0) -> float:
    """Forward FLOPs of one attention's scores and mixing for one token, averaged over the positions of ``context``.

    Args:
        config: The model.
        context: Sequence length.
        window: Keys a token sees at most; None: all before it.
        extra_keys: Keys besides the sequence's.
    """
    value_dim = config.v_head_dim if config.attn_type == "mla" else config.head_dim
    keys = context / 2 if window is None or window >= context else window - window**2 / (2 * context)
    return 2 * config.n_heads * (config.qk_head_dim + value_dim) * (keys + extra_keys)


def _once_attention_flops(config: IceConfig, layers: int, context: int) -> float:
    return sum(attention_flops_per_token(config, context, config.window(layer)) for layer in range(layers))


def _loop_attention_flops(config: IceConfig, loop: int, context: int) -> float:
    """Of one core in one loop: windows, MoDA's history and the gated window differ from loop to loop."""
    layers = config.recurrent_layers
    history = min(loop, config.moda_history_window) if config.attn_type == "moda_v2" else 0
    flops = sum(
        attention_flops_per_token(config, context, config.window(loop * layers + layer), history)
        for layer in range(layers)
    )
    if config.core == "apex":
        # The memory's other slots pass through the key and value matrices too, and the reading's scores and mixing.
        slots, kv_rows = config.memory_slots, 2 * config.n_kv_heads * config.head_dim
        flops += layers * (2 * (slots - 1) * kv_rows * config.dim + 4 * slots * config.dim)
        flops += 2 * (slots - 1) * config.dim**2  # the slots' gate
    if config.kv_policy == "gated" and loop > 0:
        flops += layers * attention_flops_per_token(config, context, config.kv_gate_window)
    return flops


def training_flops_per_token(
    config: IceConfig,
    n_loops: int | None = None,
    *,
    context: int | None = None,
    grad_loops: int | None = None,
    recompute: bool = False,
    shallow_reads: int = 0,
    probed: bool = False,
    expert_share: float = 1.0,
) -> float:
    """FLOPs to train on one token: 2 a weight forward, 4 backward, over the loops that keep a graph.

    Args:
        config: The model.
        n_loops: Depth T; None: ``config.max_loop_iters``.
        context: Sequence length; None: ``config.max_seq_len``.
        grad_loops: Loops with a backward; None: all.
        recompute: Count activation checkpointing's second forward too (hardware FLOPs; leave out for MFU).
        shallow_reads: Depths read besides the last, each a coda and a head with gradients (CDL: 1).
        probed: Two more depths are read without gradients, for the depth heads (SLU).
        expert_share: Routed expert outputs computed rather than reused (AEC), as measured.
    """
    n_loops = config.max_loop_iters if n_loops is None else n_loops
    context = config.max_seq_len if context is None else context
    count = count_parameters(config, n_loops)
    once = 3 + (1 if recompute else 0)  # forward, backward twice that, recomputed forward
    routed = 0
    if config.n_experts:
        routed = count.core_experts * config.n_experts_per_tok // config.n_experts // len(config.msrd_scales)
    weights = 2 * (count.active_per_loop - (1 - expert_share) * routed)
    core = 0.0
    for scale in config.msrd_scales:
        plan = DepthPlan(n_loops, grad_loops).at_scale(scale)
        for loop in range(plan.n_loops):
            has_graph = plan.grad_loops is None or loop >= plan.n_loops - plan.grad_loops
            core += (once if has_graph else 1) * (weights + _loop_attention_flops(config, loop, context))
    prelude = 2 * count.prelude + _once_attention_flops(config, config.prelude_layers, context)
    coda = 2 * count.coda + _once_attention_flops(config, config.coda_layers, context)
    head = 2 * config.vocab_size * config.dim
    fusion = once * 2 * count.core_fusion
    read_out = once * coda + 3 * head
    probes = 2 * (coda + head) if probed else 0
    return once * prelude + core + fusion + (1 + shallow_reads) * read_out + probes


class CacheBytes(NamedTuple):
    """What decoding remembers of one sequence: it grows by ``per_token`` and holds at most ``constant`` besides."""

    per_token: int  # every slot that sees the whole past exactly
    constant: int  # slots with a window or with pooling; reached once the sequence is as long as they remember


def cache_bytes(
    config: IceConfig, n_loops: int | None = None, bytes_per_number: int = 2, kv_policy: str | None = None
) -> CacheBytes:
    """The cache at depth ``n_loops`` under ``kv_policy`` (None: the configuration's), fed token by token.

    Slots without a window also have room for growth: up to a quarter more than ``per_token`` says.
    """
    if config.attn_type == "mla":
        row_bytes = (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_number
    else:
        row_bytes = 2 * config.n_kv_heads * config.head_dim * bytes_per_number
    pooling = Pooling.of(config)
    growing, bounded_rows = 0, 0
    for window in slot_windows(config, config.max_loop_iters if n_loops is None else n_loops, kv_policy):
        if window is not None:
            bounded_rows += most_rows(window)
        elif pooling is not None:
            bounded_rows += pooling.most_rows()
        else:
            growing += 1
    return CacheBytes(growing * row_bytes, bounded_rows * row_bytes)


def cache_bytes_per_token(
    config: IceConfig, n_loops: int | None = None, bytes_per_number: int = 2, kv_policy: str | None = None
) -> int:
    """Bytes by which one more token makes the decoding cache grow; see :func:`cache_bytes`."""
    return cache_bytes(config, n_loops, bytes_per_number, kv_policy).per_token
