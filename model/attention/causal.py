"""Causal softmax attention for queries that are the last of the keys' positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """``softmax(scale * q k^T + mask) v`` where query i of S sits at position ``L - S + i`` of the L keys.

    Args:
        q: (B, H, S, d).
        k: (B, G, L, d), G dividing H: query heads h // (H / G) share a key head.
        v: (B, G, L, v).
        scale: Factor on the scores.

    Returns:
        (B, H, S, v).
    """
    queries, keys = q.shape[-2], k.shape[-2]
    mask = None
    if 1 < queries < keys:
        # SDPA's is_causal aligns the mask to the upper left; queries appended to a cache need the lower right.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(diagonal=keys - queries)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=1 < queries == keys,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
