r"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1).

    c_t = norm(W_a x_t)            the latent, (R,)             k_rope,t = rope(W_r x_t)   ONE rotary key, (P,)
    [k_nope; v]_t,h = W_b,h c_t    per head                     q_t,h = [q_nope; rope(q_rope)]
    score = (q_nope . k_nope + q_rope . k_rope) / sqrt(N + P)

The cache holds ``[c_t; k_rope,t]``: R + P numbers per token, layer and loop, whatever the number of heads.

Two ways to compute the same thing. With no past the latent is expanded to heads (cheapest per score). With a past
the up-projections are absorbed instead, ``q_nope . W_uk c = (W_uk^T q_nope) . c``: attention runs in the latent space
with a single shared key/value head, and nothing of the past is ever expanded.

Shapes: B batch, S new tokens, L all tokens so far, D width, H heads, R kv_lora_rank, P rotary, N unrotated and
V value width of a head.
"""

from __future__ import annotations

import torch
from torch import nn

from model.attention.cache import CacheSlot
from model.attention.causal import causal_attention
from model.attention.rope import apply_rope
from model.config import IceConfig
from model.init import Linear, output_std
from model.norm import RMSNorm


class MultiHeadLatentAttention(nn.Module):
    """Causal self-attention through a low-rank latent; projections named as in DeepSeek's checkpoints."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        self.n_heads, self.kv_lora_rank = config.n_heads, config.kv_lora_rank
        self.nope_dim, self.rope_dim, self.v_dim = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.scale = config.qk_head_dim**-0.5
        query_dim = config.n_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(config.dim, query_dim)
        else:
            self.q_a_proj = Linear(config.dim, config.q_lora_rank)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config.norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, query_dim)
        self.full_rank_query = config.q_lora_rank is None
        self.kv_a_proj = Linear(config.dim, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config.norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, config.n_heads * (config.qk_nope_head_dim + config.v_head_dim))
        value_dim = config.n_heads * config.v_head_dim
        self.o_proj = Linear(value_dim, config.dim, init_std=output_std(config, value_dim))

    def forward(
        self, x_BSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot: CacheSlot | None = None
    ) -> torch.Tensor:
        """(B, S, D) to (B, S, D); ``cos`` and ``sin`` are the new tokens' RoPE tables, (S, P / 2)."""
        batch, length, _ = x_BSD.shape
        q = self.q_proj(x_BSD) if self.full_rank_query else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        q_BHSC = q.view(batch, length, self.n_heads, -1).transpose(1, 2)
        q_nope_BHSN, q_rope_BHSP = q_BHSC.split([self.nope_dim, self.rope_dim], dim=-1)
        q_rope_BHSP = apply_rope(q_rope_BHSP, cos, sin)

        latent, k_rope = self.kv_a_proj(x_BSD).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        latent_BSR, k_rope_BSP = self.kv_a_norm(latent), apply_rope(k_rope, cos, sin)

        if slot is None:
            out_BHSV = self._expanded(q_nope_BHSN, q_rope_BHSP, latent_BSR, k_rope_BSP)
        else:
            past = slot.length
            (memory_B1LC,) = slot.append(torch.cat((latent_BSR, k_rope_BSP), dim=-1).unsqueeze(1))
            if past:
                out_BHSV = self._absorbed(q_nope_BHSN, q_rope_BHSP, memory_B1LC)
            else:
                out_BHSV = self._expanded(q_nope_BHSN, q_rope_BHSP, latent_BSR, k_rope_BSP)
        output_BSD: torch.Tensor = self.o_proj(out_BHSV.transpose(1, 2).reshape(batch, length, -1))
        return output_BSD

    def _expanded(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, latent_BSR: torch.Tensor, k_rope_BSP: torch.Tensor
    ) -> torch.Tensor:
        batch, length, _ = latent_BSR.shape
        kv_BHSC = self.kv_b_proj(latent_BSR).view(batch, length, self.n_heads, -1).transpose(1, 2)
        k_nope, v_BHSV = kv_BHSC.split([self.nope_dim, self.v_dim], dim=-1)
        k_rope = k_rope_BSP.unsqueeze(1).expand(-1, self.n_heads, -1, -1)
        return causal_attention(
            torch.cat((q_nope, q_rope), dim=-1), torch.cat((k_nope, k_rope), dim=-1), v_BHSV, self.scale
        )

    def _absorbed(self, q_nope: torch.Tensor, q_rope: torch.Tensor, memory_B1LC: torch.Tensor) -> torch.Tensor:
        up_HCR = self.kv_b_proj.weight.view(self.n_heads, -1, self.kv_lora_rank)
        key_up_HNR, value_up_HVR = up_HCR.split([self.nope_dim, self.v_dim], dim=1)
        q_BHSC = torch.cat((q_nope @ key_up_HNR, q_rope), dim=-1)
        mixed_BHSR = causal_attention(q_BHSC, memory_B1LC, memory_B1LC[..., : self.kv_lora_rank], self.scale)
        out_BHSV: torch.Tensor = mixed_BHSR @ value_up_HVR.transpose(-2, -1)
        return out_BHSV
