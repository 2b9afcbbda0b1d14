r"""Apex's spiral memory: a few slots a position, rewritten a little by every step, read at every layer of the next.

    c = norm(W [norm(p); norm(r); norm(f); norm(v)] + (2 score - 1) w_s)        what a step compresses into
    g_k = sigmoid(G_c c + G_m norm(m_k) + b_k)                                  gate of slot k, for each channel
    m_k <- m_k + g_k * (c + d_k - m_k)                                          d_k, b_k of each slot
    v <- v + rate * (f - v),    0 < rate < 1/4                               the invariant, from v_0 = e

p, r, f: proposal, review, refinement of the step; ``score`` the verifier's; v the invariant *before* the step. The
biases b_k fall from slot to slot, so the first slots follow the latest step and the last ones keep what many steps
agreed on: the winding that gives the memory its name. Slots are convex mixtures of bounded things, so bounded too.

**Causal by construction.** The slots of a position are made from that position's own states and read by that position
alone. What it knows of others came through causal self-attention, so no position sees a later one's memory, and
decoding needs no memory of past tokens: it lives inside one forward.

Reading is attention from a position over its own K slots, with the grouped heads of the model's self-attention, no
rotation (slots have no place in the sequence) and a softmax over K.

Cost a token and step: ``(6 + K) D^2`` multiplications to write, ``(2 + 2 K G / H) D^2`` to read at each layer;
``(K + 1) D`` numbers of state a position.

Shapes: B batch, S sequence, D width, K slots, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

import torch
from torch import nn

from model.config import IceConfig
from model.init import Linear, output_std
from model.norm import RMSNorm

FASTEST_BIAS, SLOWEST_BIAS = 1.0, -3.0  # gates of about 0.73 and 0.05 where nothing has been learned
LARGEST_RATE = 0.25


class SpiralMemory(nn.Module):
    """The slots' first content and how a step rewrites them."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        dim, slots = config.dim, config.memory_slots
        self.first_slots = nn.Parameter(torch.empty(slots, dim))
        nn.init.normal_(self.first_slots, std=1.0)
        self.input_norm = RMSNorm(dim, config.norm_eps)
        self.compress_proj = Linear(4 * dim, dim)
        self.score_weight = nn.Parameter(torch.zeros(dim))
        self.content_norm = RMSNorm(dim, config.norm_eps)
        self.content_gate_proj = Linear(dim, dim)
        self.slot_gate_proj = Linear(dim, dim)
        self.slot_norm = RMSNorm(dim, config.norm_eps)
        self.gate_bias = nn.Parameter(torch.linspace(FASTEST_BIAS, SLOWEST_BIAS, slots))
        self.slot_shift = nn.Parameter(torch.zeros(slots, dim))
        self.rate_logit = nn.Parameter(torch.zeros(dim))

    def start(self, e_BSD: torch.Tensor) -> torch.Tensor:
        """The slots before the first step, (B, S, K, D)."""
        # Contiguous: a view that the backward keeps would pin what ZeRO-3 gathered.
        return self.first_slots.to(e_BSD.dtype).expand(*e_BSD.shape[:2], -1, -1).contiguous()

    def forward(
        self,
        slots_BSKD: torch.Tensor,
        proposal_BSD: torch.Tensor,
        review_BSD: torch.Tensor,
        refinement_BSD: torch.Tensor,
        score_BS: torch.Tensor,
        invariant_BSD: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots (B, S, K, D) and the invariant (B, S, D) after a step; ``score`` in [0, 1], fp32."""
        parts_BS4D = torch.stack((proposal_BSD, review_BSD, refinement_BSD, invariant_BSD), dim=2)
        content_BSD = self.compress_proj(self.input_norm(parts_BS4D).flatten(2))
        told_BSD = (2 * score_BS.unsqueeze(-1) - 1).to(content_BSD.dtype) * self.score_weight.to(content_BSD.dtype)
        content_BSD = self.content_norm(content_BSD + told_BSD)
        gate_BSKD = self.content_gate_proj(content_BSD).unsqueeze(2) + self.slot_gate_proj(self.slot_norm(slots_BSKD))
        gate_BSKD = torch.sigmoid(gate_BSKD + self.gate_bias.to(gate_BSKD.dtype).unsqueeze(-1))
        wanted_BSKD = content_BSD.unsqueeze(2) + self.slot_shift.to(content_BSD.dtype)
        rate_D = LARGEST_RATE * torch.sigmoid(self.rate_logit).to(invariant_BSD.dtype)
        return (
            torch.lerp(slots_BSKD, wanted_BSKD, gate_BSKD),
            torch.lerp(invariant_BSD, refinement_BSD, rate_D.expand_as(invariant_BSD)),
        )


class MemoryAttention(nn.Module):
    """Attention of each position over its own slots; what it found, as an update to the residual stream."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.slot_norm = RMSNorm(config.dim, config.norm_eps)
        self.q_proj = Linear(config.dim, config.dim)
        self.kv_proj = Linear(config.dim, 2 * self.n_kv_heads * self.head_dim)
        self.o_proj = Linear(config.dim, config.dim, init_std=output_std(config, config.dim))

    def forward(self, x_BSD: torch.Tensor, slots_BSKD: torch.Tensor) -> torch.Tensor:
        """(B, S, D) and (B, S, K, D) to (B, S, D)."""
        batch, length, dim = x_BSD.shape
        q_BSGRC = self.q_proj(x_BSD).view(batch, length, self.n_kv_heads, -1, self.head_dim)
        kv_BSK2GC = self.kv_proj(self.slot_norm(slots_BSKD)).unflatten(-1, (2, self.n_kv_heads, self.head_dim))
        k_BSKGC, v_BSKGC = kv_BSK2GC.unbind(dim=3)
        scores_BSGRK = torch.einsum("bsgrc,bskgc->bsgrk", q_BSGRC, k_BSKGC) * self.head_dim**-0.5
        weights_BSGRK = scores_BSGRK.float().softmax(dim=-1).to(x_BSD.dtype)
        found_BSD = torch.einsum("bsgrk,bskgc->bsgrc", weights_BSGRK, v_BSKGC).reshape(batch, length, dim)
        update_BSD: torch.Tensor = self.o_proj(found_BSD)
        return update_BSD
