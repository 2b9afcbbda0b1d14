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

from typing import TYPE_CHECKING

import torch
from torch import nn

from model.attention.causal import Memory, causal_attention
from model.attention.context import Carry, Site
from model.attention.rope import apply_rope, yarn_logit_factor
from model.config import IceConfig
from model.init import Linear, output_std
from model.norm import RMSNorm

if TYPE_CHECKING:
    from model.attention.causal import Mask


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
        self.scale = config.qk_head_dim**-0.5 * yarn_logit_factor(config)
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

    def forward(self, x_BSD: torch.Tensor, site: Site, carry: Carry = ()) -> tuple[torch.Tensor, Carry]:
        """(B, S, D) to (B, S, D); leaves nothing for the next loop."""
        queries, new = self.read(x_BSD, site)
        return self.write(self.mix(queries, site.remember(*new), site)), ()

    def read(self, x_BSD: torch.Tensor, site: Site) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """What the new tokens ask with, and what is remembered of them."""
        return self.project_queries(x_BSD, site), (self.project_latent(x_BSD, site),)

    def mix(self, queries: tuple[torch.Tensor, ...], memory: Memory, site: Site) -> torch.Tensor:
        """What each head takes from ``memory``, (B, H, S, V)."""
        q_nope_BHSN, q_rope_BHSP = queries
        attend = self.absorbed if site.past else self.expanded
        return attend(q_nope_BHSN, q_rope_BHSP, memory.tensors[0], site.mask(q_nope_BHSN.shape[2], memory))

    def write(self, mixed_BHSV: torch.Tensor) -> torch.Tensor:
        """What the heads have found, into the residual stream, (B, S, D)."""
        output_BSD: torch.Tensor = self.o_proj(mixed_BHSV.transpose(1, 2).flatten(2))
        return output_BSD

    def project_queries(self, x_BSD: torch.Tensor, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        """The unrotated (B, H, S, N) and rotated (B, H, S, P) parts of the queries."""
        batch, length, _ = x_BSD.shape
        q = self.q_proj(x_BSD) if self.full_rank_query else self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSD)))
        q_BHSC = q.view(batch, length, self.n_heads, -1).transpose(1, 2)
        q_nope_BHSN, q_rope_BHSP = q_BHSC.split([self.nope_dim, self.rope_dim], dim=-1)
        return q_nope_BHSN, apply_rope(q_rope_BHSP, site.rope)

    def project_latent(self, x_BSD: torch.Tensor, site: Site) -> torch.Tensor:
        """``[c_t; k_rope,t]``, (B, 1, S, R + P): what is remembered of a token."""
        latent, k_rope = self.kv_a_proj(x_BSD).unsqueeze(1).split([self.kv_lora_rank, self.rope_dim], dim=-1)
        return torch.cat((self.kv_a_norm(latent), apply_rope(k_rope, site.rope)), dim=-1)

    def expanded(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, memory_B1LC: torch.Tensor, mask: Mask | None
    ) -> torch.Tensor:
        """Attention per head, (B, H, S, V), the latents of all L tokens expanded to heads."""
        latent_B1LR, k_rope_B1LP = memory_B1LC.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        batch, _, length, _ = latent_B1LR.shape
        kv_BHLC = self.kv_b_proj(latent_B1LR).view(batch, length, self.n_heads, -1).transpose(1, 2)
        k_nope, v_BHLV = kv_BHLC.split([self.nope_dim, self.v_dim], dim=-1)
        k = torch.cat((k_nope, k_rope_B1LP.expand(-1, self.n_heads, -1, -1)), dim=-1)
        return causal_attention(torch.cat((q_nope, q_rope), dim=-1), k, v_BHLV, self.scale, mask)

    def absorbed(
        self, q_nope: torch.Tensor, q_rope: torch.Tensor, memory_B1LC: torch.Tensor, mask: Mask | None
    ) -> torch.Tensor:
        """The same in the latent space: nothing of the L tokens is expanded."""
        up_HCR = self.kv_b_proj.weight.view(self.n_heads, -1, self.kv_lora_rank)
        key_up_HNR, value_up_HVR = up_HCR.split([self.nope_dim, self.v_dim], dim=1)
        q_BHSC = torch.cat((q_nope @ key_up_HNR, q_rope), dim=-1)
        latent_B1LR = memory_B1LC[..., : self.kv_lora_rank]
        mixed_BHSR = causal_attention(q_BHSC, memory_B1LC, latent_B1LR, self.scale, mask)
        out_BHSV: torch.Tensor = mixed_BHSR @ value_up_HVR.transpose(-2, -1)
        return out_BHSV
