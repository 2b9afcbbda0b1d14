"""How many parameters a configuration has, how many a token uses, and what a token costs; counted on the meta device.

The numbers come from the model itself (built without memory), so they cannot drift from the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import IceConfig
from model.looped_lm import IceModel

# Which part of the count a parameter of the core belongs to, by what its name contains; the first match wins.
_CORE_PARTS = (
    ("core.injection.", "injection"),
    ("core.halting.", "halting"),
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
    "core_other",
    "injection",
    "halting",
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
    core_other: int  # norms, loop-step embedding, learned initial state
    injection: int
    halting: int
    coda: int
    head: int
    final_norms: int  # the norm after the prelude and the one before the head
    total: int
    active_per_loop: int  # of the core, used by one token in one loop
    active: int  # distinct parameters one token uses, whole embedding table and head included
    executed: int  # used by one token over all T loops: a looped one T times, of the embedding one row

    @property
    def core(self) -> int:
        """Everything inside the loop."""
        in_full: int = sum(getattr(self, part) for part in _USED_EACH_LOOP)
        return self.core_experts + in_full


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
    per_loop = sum(counts[part] for part in _USED_EACH_LOOP)
    if config.n_experts:
        per_loop += counts["core_experts"] * config.n_experts_per_tok // config.n_experts
    outside = counts["prelude"] + counts["coda"] + counts["final_norms"]
    head = counts["embedding"] if config.tie_embeddings else counts["head"]
    return ParameterCount(
        **counts,
        total=sum(counts.values()),
        active_per_loop=per_loop,
        active=counts["embedding"] + outside + counts["head"] + per_loop,
        executed=config.dim + outside + head + n_loops * per_loop,
    )


def _part_of(name: str) -> str:
    top = name.split(".")[0]
    match top:
        case "embed":
            return "embedding"
        case "prelude" | "coda" | "head":
            return top
        case "core":
            return next((part for needle, part in _CORE_PARTS if needle in name), "core_other")
        case _:
            return "final_norms"


def attention_flops_per_token(config: IceConfig, context: int) -> float:
    """Forward FLOPs of one attention's scores and mixing for one token with ``context / 2`` keys on average."""
    value_dim = config.head_dim if config.attn_type == "gqa" else config.v_head_dim
    return 2 * config.n_heads * (config.qk_head_dim + value_dim) * context / 2


def training_flops_per_token(
    config: IceConfig,
    n_loops: int | None = None,
    *,
    context: int | None = None,
    grad_loops: int | None = None,
    recompute: bool = False,
) -> float:
    """FLOPs to train on one token: 2 a weight forward, 4 backward, over the loops that keep a graph.

    Args:
        config: The model.
        n_loops: Depth T; None: ``config.max_loop_iters``.
        context: Sequence length; None: ``config.max_seq_len``.
        grad_loops: Loops with a backward; None: all.
        recompute: Count activation checkpointing's second forward too (hardware FLOPs; leave out for MFU).
    """
    n_loops = config.max_loop_iters if n_loops is None else n_loops
    context = config.max_seq_len if context is None else context
    with_grad = n_loops if grad_loops is None else min(grad_loops, n_loops)
    count = count_parameters(config, n_loops)
    attention = attention_flops_per_token(config, context)
    per_loop = 2 * count.active_per_loop + config.recurrent_layers * attention
    once_blocks = 2 * (count.prelude + count.coda) + (config.prelude_layers + config.coda_layers) * attention
    head = 2 * config.vocab_size * config.dim
    extra = 1 if recompute else 0
    return (3 + extra) * once_blocks + 3 * head + n_loops * per_loop + (2 + extra) * with_grad * per_loop


def cache_bytes_per_token(config: IceConfig, n_loops: int | None = None, bytes_per_number: int = 2) -> int:
    """Bytes of decoding cache one token takes: every layer, the core's once per loop."""
    n_loops = config.max_loop_iters if n_loops is None else n_loops
    if config.attn_type == "mla":
        numbers = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        numbers = 2 * config.n_kv_heads * config.head_dim
    layers = config.prelude_layers + n_loops * config.recurrent_layers + config.coda_layers
    return layers * numbers * bytes_per_number
