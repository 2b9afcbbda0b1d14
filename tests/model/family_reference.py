"""Apex's and RR-SLM's loops once more: float64, position by position, by the formulas; ``model`` gives weights only."""

from __future__ import annotations

from typing import Any

import torch
from slow_reference import naive_attention, naive_rope
from torch import Tensor

from model import IceConfig
from model.step_embedding import LoopStepEmbedding


def rms(x: Tensor, norm: Any) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def self_attention(attention: Any, x: Tensor, config: IceConfig, window: int | None) -> Tensor:
    """Grouped-query attention of (S, D), the keys of earlier positions outside the window left out."""
    heads, groups, width = config.n_heads, config.n_kv_heads, config.head_dim
    q, k, v = (x @ attention.qkv_proj.weight.T).split([heads * width, groups * width, groups * width], dim=-1)
    q, k, v = (each.view(len(x), -1, width).transpose(0, 1) for each in (q, k, v))
    if config.qk_norm:
        q, k = rms(q, attention.q_norm), rms(k, attention.k_norm)
    q, k = (naive_rope(each.clone(), list(range(len(x))), config.rope_theta) for each in (q, k))
    k, v = (each.repeat_interleave(heads // groups, dim=0) for each in (k, v))
    out = []
    for i in range(len(x)):
        first = 0 if window is None else max(0, i - window + 1)
        last = naive_attention(q[None, :, i : i + 1], k[None, :, first : i + 1], v[None, :, first : i + 1], width**-0.5)
        out.append(last[0, :, 0].flatten())
    return torch.stack(out) @ attention.o_proj.weight.T


def swiglu(ffn: Any, x: Tensor) -> Tensor:
    gate, up = (x @ ffn.gate_up_proj.weight.T).chunk(2, dim=-1)
    return gate * gate.sigmoid() * up @ ffn.down_proj.weight.T


def refine(core: Any, e: Tensor, config: IceConfig, iterations: int) -> tuple[Tensor, list[int]]:
    """The latents (S, D) of one sequence after ``iterations``, and how many each position was given."""
    h, given, running = e.clone(), [0] * len(e), [True] * len(e)
    for iteration in range(iterations):
        start = stream = rms(h + e, core.norm)
        for layer, block in enumerate(core.blocks):
            window = config.window(iteration * len(core.blocks) + layer)
            stream = stream + self_attention(block.attention, rms(stream, block.attention_norm), config, window)
            stream = stream + swiglu(block.ffn, rms(stream, block.ffn_norm))
        gate = (torch.cat((start, stream), dim=-1) @ core.gate_proj.weight.T + core.gate_bias).sigmoid()
        new = (1 - gate) * h + gate * stream
        for position in range(len(e)):
            if running[position]:
                change = (new[position] - h[position]).norm() / new[position].norm()
                given[position] += 1
                running[position] = bool(change >= config.convergence_eps)
                h[position] = new[position]
    return h, given


def memory_attention(reader: Any, x: Tensor, slots: Tensor, config: IceConfig) -> Tensor:
    """One position (D,) over its slots (K, D)."""
    width, repeats = config.head_dim, config.n_heads // config.n_kv_heads
    keys, values = (rms(slots, reader.slot_norm) @ reader.kv_proj.weight.T).chunk(2, dim=-1)
    found = []
    for head in range(config.n_heads):
        of_head = slice(head * width, (head + 1) * width)
        of_group = slice(head // repeats * width, (head // repeats + 1) * width)
        query = (reader.q_proj.weight @ x)[of_head]
        weights = (keys[:, of_group] @ query / width**0.5).softmax(0)
        found.append(weights @ values[:, of_group])
    return reader.o_proj.weight @ torch.cat(found)


def verifier_logits(verifier: Any, refinement: Tensor) -> Tensor:
    normed = refinement / (refinement.square().mean(-1, keepdim=True) + verifier.eps).sqrt()
    hidden = normed @ verifier.input_weight.T + verifier.input_bias
    return (hidden * hidden.sigmoid()) @ verifier.output_weight.T + verifier.output_bias


def rewrite(memory: Any, slots: Tensor, parts: list[Tensor], score: Tensor) -> Tensor:
    """One position's slots (K, D) after a step; ``parts``: proposal, review, refinement, invariant."""
    content = memory.compress_proj.weight @ torch.cat([rms(part, memory.input_norm) for part in parts])
    content = rms(content + (2 * score - 1) * memory.score_weight, memory.content_norm)
    new = []
    for number, slot in enumerate(slots):
        gate = memory.content_gate_proj.weight @ content + memory.slot_gate_proj.weight @ rms(slot, memory.slot_norm)
        gate = (gate + memory.gate_bias[number]).sigmoid()
        new.append(slot + gate * (content + memory.slot_shift[number] - slot))
    return torch.stack(new)


def apex(core: Any, e: Tensor, config: IceConfig, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the coda reads (S, D), the verifier's logits (T, S, 2), and the inconsistency (S,), of one sequence."""
    h, invariant = e, e
    slots = core.memory.first_slots.expand(len(e), -1, -1)
    rate = 0.25 * core.memory.rate_logit.sigmoid()
    logits, inconsistency = [], torch.zeros(len(e), dtype=e.dtype)
    step_embedding: LoopStepEmbedding = core.step_embedding
    for step in range(steps):
        stream = rms(h + e, core.norm) + step_embedding(step).to(e.dtype)
        for layer, block in enumerate(core.blocks):
            window = config.window(step * len(core.blocks) + layer)
            stream = stream + self_attention(block.attention, rms(stream, block.attention_norm), config, window)
            normed = rms(stream, block.memory_norm)
            stream = stream + torch.stack(
                [memory_attention(block.memory_attention, x, m, config) for x, m in zip(normed, slots, strict=True)]
            )
            stream = stream + swiglu(block.ffn, rms(stream, block.ffn_norm))
        h, normed = stream, rms(stream, core.head_norm)
        heads = (core.proposal_proj, core.review_proj, core.refinement_proj)
        proposal, review, refinement = (normed @ head.weight.T for head in heads)
        logits.append(verifier_logits(core.verifier, refinement))
        parts = zip(slots, proposal, review, refinement, invariant, logits[-1][:, 0].sigmoid(), strict=True)
        slots = torch.stack([rewrite(core.memory, m, [p, r, f, v], score) for m, p, r, f, v, score in parts])
        invariant = invariant + rate * (refinement - invariant)
        inconsistency += ((proposal - refinement) ** 2).mean(-1) + ((review - refinement) ** 2).mean(-1)
    normed = rms(h, core.read_norm)
    found = [memory_attention(core.memory_read, x, m, config) for x, m in zip(normed, slots, strict=True)]
    return h + torch.stack(found), torch.stack(logits), inconsistency / steps
