"""Causal softmax attention over what a layer remembers, and the masks it needs.

Keys lie as ``[pooled entries | exact tokens]``; the S queries are the last S of the exact tokens. A query sees every
pooled entry (each is older than any query), and the exact tokens not after it, within its window, of its own document
and not padding. The mask is additive: pooled entries stand for several tokens and carry ``log(count)``.

Where nothing but a window and documents hides keys, and all tokens are new, it may be a ``BlockMask`` instead, which is
never written out (``flex.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask: TypeAlias = torch.Tensor | BlockMask


class Memory(NamedTuple):
    """What the S new tokens of a layer attend to, themselves included."""

    tensors: tuple[torch.Tensor, ...]  # each (B, heads, P + L, width): P pooled entries, then L exact tokens
    pooled_bias_BP: torch.Tensor | None = None  # log(count) of pooled entries, -inf for an empty one; None: P = 0


def attention_mask(
    queries: int,
    memory: Memory,
    window: int | None = None,
    padding_B: torch.Tensor | None = None,
    past: int = 0,
    document_ids_BS: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The additive mask, fp32, broadcastable to (B, 1, S, P + L); None where plain causality says it all.

    Args:
        queries: S.
        memory: What the layer attends to.
        window: Keys a query sees, itself included; None: all.
        padding_B: Tokens at the left of each row that are padding; they are never seen by another token.
        past: Tokens before the queries, forgotten ones included: what padding is counted against.
        document_ids_BS: Which document each of the S tokens belongs to, where several share a row and none sees
            another; without a past. None: a row is one document.
    """
    bias_BP = memory.pooled_bias_BP
    pooled = 0 if bias_BP is None else bias_BP.shape[1]
    keys = memory.tensors[0].shape[-2] - pooled
    windowed = window is not None and keys > window
    whole_rows = padding_B is None and bias_BP is None and document_ids_BS is None
    if not windowed and whole_rows and (queries == 1 or queries == keys):
        return None
    device = memory.tensors[0].device
    # Positions counted from the last exact key: the oldest one is past + queries - keys.
    key_L = torch.arange(keys, device=device) + (past + queries - keys)
    query_S1 = torch.arange(past, past + queries, device=device).unsqueeze(1)
    seen = key_L <= query_S1
    if window is not None:
        seen = seen & (key_L > query_S1 - window)
    if document_ids_BS is not None:
        seen = seen & (document_ids_BS.unsqueeze(-1) == document_ids_BS.unsqueeze(-2)).unsqueeze(1)
    if padding_B is not None:
        # A padding query sees itself, so that no row of the softmax is empty.
        real = key_L >= padding_B.view(-1, 1, 1, 1)
        seen = (seen & real) | (key_L == query_S1)
    mask = torch.zeros(seen.shape, device=device).masked_fill(~seen, float("-inf"))
    if bias_BP is not None:
        mask = mask.expand(bias_BP.shape[0], 1, queries, keys)
        pooled_mask = bias_BP.float().view(-1, 1, 1, pooled).expand(-1, 1, queries, pooled)
        mask = torch.cat((pooled_mask, mask), dim=-1)
    return mask


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: Mask | None = None
) -> torch.Tensor:
    """``softmax(scale * q k^T + mask) v``; without a mask each query sees the keys up to its own place.

    Args:
        q: (B, H, S, d).
        k: (B, G, L, d), G dividing H: query heads h // (H / G) share a key head. S is 1 or L when there is no mask.
        v: (B, G, L, v).
        scale: Factor on the scores.
        mask: From :func:`attention_mask`, or :func:`~model.attention.flex.block_mask`.

    Returns:
        (B, H, S, v).
    """
    if mask is not None and not isinstance(mask, torch.Tensor):
        from model.attention.flex import windowed_attention

        return windowed_attention(q, k, v, scale, mask)
    queries, keys = q.shape[-2], k.shape[-2]
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask.to(q.dtype),
        is_causal=mask is None and 1 < queries == keys,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
