"""The attentions a block may use. To add one: a file here, an entry in ``ATTENTIONS``, a name in ``attn_type``.

Contract: ``Attention(config)(x_BSD, cos, sin, slot) -> (B, S, D)``, causal over the slot's past and the S new tokens.
"""

from torch import nn

from model.attention.cache import Cache, CacheSlot
from model.attention.gqa import GroupedQueryAttention
from model.attention.mla import MultiHeadLatentAttention
from model.attention.rope import apply_rope, rope_tables
from model.config import IceConfig

ATTENTIONS: dict[str, type[nn.Module]] = {"gqa": GroupedQueryAttention, "mla": MultiHeadLatentAttention}


def build_attention(config: IceConfig) -> nn.Module:
    """The attention ``config.attn_type`` names."""
    return ATTENTIONS[config.attn_type](config)


__all__ = [
    "ATTENTIONS",
    "Cache",
    "CacheSlot",
    "GroupedQueryAttention",
    "MultiHeadLatentAttention",
    "apply_rope",
    "build_attention",
    "rope_tables",
]
