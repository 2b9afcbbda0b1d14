"""Independent, slow, float64 statements of what the model computes; nothing here is imported by ``model``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention, one query at a time: q (B, H, S, d), k and v with the same H."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    past = k.shape[2] - q.shape[2]
    for i in range(q.shape[2]):
        seen = past + i + 1
        weights = (torch.einsum("bhd,bhld->bhl", q[:, :, i], k[:, :, :seen]) * scale).softmax(-1)
        out[:, :, i] = torch.einsum("bhl,bhlv->bhv", weights, v[:, :, :seen])
    return out


def naive_rope(x: torch.Tensor, positions: list[int], theta: float) -> torch.Tensor:
    """Rotate channel pairs (i, i + d/2) of x (..., S, d) as complex numbers."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    for row, position in enumerate(positions):
        for i in range(half):
            angle = position * theta ** (-2 * i / x.shape[-1])
            z[..., row, i] *= complex(math.cos(angle), math.sin(angle))
    return torch.cat((z.real, z.imag), dim=-1)


def naive_route(
    scores: torch.Tensor, bias: torch.Tensor, top_k: int, groups: int, top_groups: int, norm: bool, scale: float
) -> dict[int, float]:
    """Route one token given its scores (E,): expert to gate."""
    choice = scores + bias
    size = len(choice) // groups
    if groups > 1:
        strength = [sum(sorted(choice[g * size : (g + 1) * size].tolist())[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -strength[g])[:top_groups]
    else:
        kept = [0]
    candidates = [e for g in kept for e in range(g * size, (g + 1) * size)]
    chosen = sorted(candidates, key=lambda e: -float(choice[e]))[:top_k]
    total = sum(float(scores[e]) for e in chosen) if norm else 1.0
    return {e: scale * float(scores[e]) / total for e in chosen}


def moe_loop(
    x: torch.Tensor, gates: torch.Tensor, experts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Routed part of a MoE layer by a loop over experts: x (N, D), gates and experts (N, K)."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        tokens, slots = torch.where(experts == expert)
        gate, up = (x[tokens] @ gate_up[expert].T).chunk(2, dim=-1)
        out = out.index_add(0, tokens, (F.silu(gate) * up) @ down[expert].T * gates[tokens, slots, None])
    return out
