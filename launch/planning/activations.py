r"""What the forward leaves for the backward, in bytes a token, block by block.

Each function lists what autograd saves in one place of the model (``b`` bytes a number in the model's dtype, 4 in
fp32), so that it can be read beside the code:

    norm of width D       its input and the normalised input in fp32, its output           8 D + b D
    attention             queries, keys, values (and the projection they are views of), its output, one logsumexp a head
    SwiGLU of width F     gate and up, silu(gate), their product                            4 b F
    routed experts        K rows: dispatched input, 4 F as above, output                    K b (2 D + 4 F)

A checkpointed block saves its input only and has all this for as long as its backward runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import IceConfig


@dataclass(frozen=True)
class BlockBytes:
    """Of one token in one block (one loop of a core, all its layers)."""

    saved: float  # for the backward
    forward_passing: float  # alive besides at the fullest moment of the forward
    backward_passing: float  # the same of the backward: gradients of activations


def norm_bytes(width: int, dtype_bytes: int) -> float:
    """An RMSNorm's saved bytes, its output (the next matrix's input) included."""
    return (8 + dtype_bytes) * width


def attention_bytes(config: IceConfig, dtype_bytes: int) -> float:
    """Saved by an attention, its own input apart."""
    heads, b = config.n_heads, dtype_bytes
    if config.attn_type == "mla":
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        query = norm_bytes(config.q_lora_rank, b) if config.q_lora_rank else 0
        latent = 8 * rank + b * (rank + rope)
        keys_and_queries = 2 * b * heads * config.qk_head_dim
        values = b * heads * (config.qk_nope_head_dim + config.v_head_dim)
        return query + latent + keys_and_queries + values + heads * (b * config.v_head_dim + 4)
    keys, width = config.n_kv_heads, config.head_dim
    projected, rotated = heads + 2 * keys, heads + keys
    normed = 8 * rotated * width if config.qk_norm else 0
    return normed + b * (projected + rotated) * width + heads * (b * width + 4)


def dense_block(config: IceConfig, dtype_bytes: int) -> BlockBytes:
    """A prelude or coda block, or a core's without experts."""
    b, dim = dtype_bytes, config.dim
    norms = (4 if config.sandwich_norm else 2) * norm_bytes(dim, b)
    saved = norms + attention_bytes(config, b) + 4 * b * config.ffn_dim
    return BlockBytes(saved, 2 * b * dim, b * (4 * config.ffn_dim + 2 * dim))


def core_loop(config: IceConfig, dtype_bytes: int) -> BlockBytes:
    """One loop of one core."""
    b, dim, layers = dtype_bytes, config.dim, config.recurrent_layers
    entry = norm_bytes(dim, b)  # of state and input
    if config.n_experts == 0:
        block = dense_block(config, b)
        return BlockBytes(entry + layers * block.saved, block.forward_passing, block.backward_passing)
    top_k, hidden = config.n_experts_per_tok, config.expert_dim
    rows = top_k * b * (2 * dim + 4 * hidden)
    shared = 4 * b * config.n_shared_experts * hidden
    routing = 3 * 4 * config.n_experts
    norms = (4 if config.sandwich_norm else 2) * norm_bytes(dim, b)
    adapters = 3 * b * config.lora_rank + (b * dim if config.lora_rank else 0)
    saved = entry + layers * (norms + attention_bytes(config, b) + rows + shared + routing + adapters)
    # Rows on their way: sent, received, grouped, and back; fp32 where they are weighted.
    return BlockBytes(saved, top_k * (2 * b + 4) * dim, top_k * (2 * b + 4) * dim + 2 * b * top_k * hidden)


def loop_state_bytes(config: IceConfig, dtype_bytes: int) -> float:
    """What one loop hands to the next, a token: the state, and the carries of the ideas that remember."""
    carried = dtype_bytes * config.dim
    if config.attn_type == "moda_v2":  # its newest key and value; older ones are the earlier loops'
        carried += 2 * dtype_bytes * config.n_kv_heads * config.head_dim * config.recurrent_layers
    if config.act:
        carried += 4 * (config.dim + 2)
    if config.aec:
        carried += config.recurrent_layers * (2 * dtype_bytes * config.dim + 8 * (config.n_experts_per_tok + 1))
    return carried
