r"""Attention over a window, or within documents, without a matrix of the mask: torch's ``flex_attention``.

    seen(q, k) = k <= q  and  k > q - window  and  document[q] == document[k]

``scaled_dot_product_attention`` takes such a mask only written out, S x S numbers a sequence, computes every score all
the same, and on CUDA leaves its flash kernel for it. ``flex_attention`` (Dong et al. 2024, arXiv:2412.05496) is told
the condition, and which blocks of 128 x 128 it leaves empty, full or mixed: empty ones cost nothing, and only mixed
ones look at the condition. A window W over S tokens then costs S W instead of S S / 2.

The blocks are found from positions and from the least and greatest document of each block: (S / 128)^2 numbers, no
S x S ones, nothing read on the host. Where documents are numbered out of order a block may be called mixed that is
empty; the condition is right there all the same.

On CUDA the function is compiled by inductor (Triton) on its first use, some seconds for each shape. On a CPU torch
compiles it forward only; uncompiled it writes all scores out, which is what the tests compare.

Shapes: B batch, S queries and keys, H query heads, G key/value heads, C head width, V value width, N blocks.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

AttentionKernel = Literal["sdpa", "flex"]
BLOCK = 128
_COMPILED_VARIANTS = 64


def block_mask(
    length: int, device: torch.device, window: int | None = None, document_ids_BS: torch.Tensor | None = None
) -> BlockMask:
    """The mask of ``length`` tokens over themselves.

    Args:
        length: S.
        device: Of the queries.
        window: Keys a query sees, itself included; None: all before it.
        document_ids_BS: Which document each token belongs to; None: all to one.
    """

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        visible = key <= query
        if window is not None:
            visible = visible & (key > query - window)
        if document_ids_BS is not None:
            visible = visible & (document_ids_BS[batch, query] == document_ids_BS[batch, key])
        return visible

    some, full = _blocks_seen(length, device, window, document_ids_BS)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~full), *_ordered(full), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(length, length)
    )


def _blocks_seen(
    length: int, device: torch.device, window: int | None, document_ids_BS: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks may hold a seen pair, and which hold nothing else, each (B or 1, 1, N, N)."""
    first_N = torch.arange(0, length, BLOCK, device=device)
    last_N = (first_N + BLOCK - 1).clamp_max(length - 1)
    query_first, query_last = first_N.unsqueeze(1), last_N.unsqueeze(1)
    some, full = first_N <= query_last, last_N <= query_first
    if window is not None:
        some, full = some & (last_N > query_first - window), full & (first_N > query_last - window)
    # The kernel asks the condition, and not the block, whether a place past the last token is seen.
    whole_N = first_N + BLOCK <= length
    full = full & whole_N & whole_N.unsqueeze(1)
    some, full = some[None, None], full[None, None]
    if document_ids_BS is not None:
        repeated_last = document_ids_BS[:, -1:].expand(-1, -length % BLOCK)
        blocks_BNC = torch.cat((document_ids_BS, repeated_last), dim=1).unflatten(1, (-1, BLOCK))
        low, high = blocks_BNC.amin(-1)[:, None], blocks_BNC.amax(-1)[:, None]
        query_low, query_high = low.unsqueeze(-1), high.unsqueeze(-1)
        low, high = low.unsqueeze(-2), high.unsqueeze(-2)
        some = some & (low <= query_high) & (query_low <= high)
        full = full & (low == high) & (query_low == query_high) & (low == query_low)
    return some, full & some


def _ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row of blocks has, and which: those first, in order."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def windowed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: BlockMask
) -> torch.Tensor:
    """``softmax(scale * q k^T) v`` over what ``mask`` lets be seen, (B, H, S, V).

    Args:
        q: (B, H, S, C).
        k: (B, G, S, C), G dividing H.
        v: (B, G, S, V).
        scale: Factor on the scores.
        mask: From :func:`block_mask`.
    """
    out: torch.Tensor = _function(q.device.type)(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out


def windowed_attention_and_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: BlockMask
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the natural logarithm of each query's sum of exponentials, (B, H, S); both have gradients."""
    out, aux = _function(q.device.type)(
        q,
        k,
        v,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


@functools.cache
def _function(device_type: str) -> Any:
    """``flex_attention``, compiled where there are kernels for both directions."""
    if device_type == "cpu":
        return flex_attention
    # Windows, head widths, dtypes and lengths are variants of one function; past the limit torch would run it
    # uncompiled, scores written out. fullgraph makes that an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VARIANTS)
    return torch.compile(flex_attention, fullgraph=True)


def probe(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why ``flex_attention`` cannot be used on ``device``, in one line; None: it can, and agrees with SDPA.

    Compiles and runs it forward and backward on two hundred tokens with a window and documents.
    """
    if device.type != "cuda":
        return f"no kernels for both directions on {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than sm_80"
    try:
        return _disagreement(device, dtype, head_dim, value_dim)
    except Exception as error:
        # Whatever the compiler dies of: a lack of Triton, of a C compiler, of shared memory.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _disagreement(device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    length, window = 200, 70
    generator = torch.Generator().manual_seed(0)
    q, k, v, factor = (
        torch.randn(2, heads, length, width, generator=generator).to(device, dtype)
        for heads, width in ((4, head_dim), (2, head_dim), (2, value_dim), (4, value_dim))
    )
    documents_BS = (torch.arange(length, device=device) // 90).expand(2, -1)
    place = torch.arange(length, device=device)
    distance = place.unsqueeze(1) - place
    same_document = (documents_BS.unsqueeze(-1) == documents_BS.unsqueeze(-2)).unsqueeze(1)
    seen = (distance >= 0) & (distance < window) & same_document
    mask = block_mask(length, device, window, documents_BS)
    scale = head_dim**-0.5
    found = []
    with torch.enable_grad():
        for attend in (
            lambda q, k, v: windowed_attention(q, k, v, scale, mask),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True),
        ):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = attend(*leaves)
            found.append((out, *torch.autograd.grad(out, leaves, factor)))
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    for name, got, expected in zip(("output", "dq", "dk", "dv"), *found, strict=True):
        error = float((got.float() - expected.float()).norm() / expected.float().norm())
        if not error < tolerance:
            return f"its {name} is off by {error:.1e}"
    return None
