"""The transformer block of prelude, core and coda, as a function that returns its *update*.

    a = attention(norm(x));  f = ffn(norm(x + a));  block(x) = a + f        so the usual block output is x + block(x)

Returning the update rather than ``x + update`` lets the loop use it as F(h, e, t) without subtracting x again, which
in bf16 would lose the update's low bits.
"""

from __future__ import annotations

import torch
from torch import nn

from model.attention import CacheSlot, build_attention
from model.config import IceConfig
from model.moe import MoELayer
from model.norm import RMSNorm
from model.swiglu import SwiGLU


class Block(nn.Module):
    """Pre-norm attention and feed-forward; ``ffn`` is a :class:`SwiGLU` or, in a core with experts, a MoELayer."""

    def __init__(self, config: IceConfig, *, moe: bool = False, load_layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn: nn.Module = MoELayer(config, load_layer) if moe else SwiGLU(config, config.ffn_dim)

    def forward(
        self, x_BSD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slot: CacheSlot | None = None
    ) -> torch.Tensor:
        """The update, (B, S, D), to add to ``x``."""
        attended = self.attention(self.attention_norm(x_BSD), cos, sin, slot)
        update_BSD: torch.Tensor = attended + self.ffn(self.ffn_norm(x_BSD + attended))
        return update_BSD
