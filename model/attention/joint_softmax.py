r"""One softmax over a causal sequence and, for each position, a few keys of its own.

    s_i = scale * q . k_i + mask_i         i over the L keys of the sequence
    h_j = scale * q . k'_j                 j over the W keys that belong to the query's own position
    out = (sum_i e^(s_i) v_i + sum_j e^(h_j) v'_j) / (sum_i e^(s_i) + sum_j e^(h_j))

Appending k' to the keys would take S * W more of them, each masked for all queries but one. Instead the sequence goes
through a flash kernel, which also returns ``lse = log sum_i e^(s_i)``, and the rest is joined to it:

    joint = logaddexp(lse, h_1, ..., h_W)
    out   = e^(lse - joint) * out_sequence + sum_j e^(h_j - joint) v'_j

The backward of a joint softmax is ``ds = p * (grad . v - delta)`` with ``delta = grad . out`` and ``p = e^(s - joint)``
for either kind of key. So the kernel's own backward, given the joint ``out`` and ``joint`` for its logsumexp, returns
the exact gradients of the sequence; those of the W keys are written out here, one key at a time.

Cost: the sequence's attention, plus 4 C FLOPs per query, head and own key forward (10 C backward). Saved for the
backward: what the flash kernel saves and references to the W keys and values; no copy of them, no score.

Shapes: B batch, S queries, L keys, H = G * R query heads, G key/value heads, C head width, W keys of a position's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from model.attention.causal import causal_attention
from model.attention.flash_kernels import FlashKernel, FlashResult, flash_kernel, is_causal

if TYPE_CHECKING:
    from model.attention.causal import Mask

# k'_1, v'_1, ..., k'_W, v'_W, each (B, G, S, C).
OwnKeys = tuple[torch.Tensor, ...]


def joint_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own: OwnKeys,
    scale: float,
    mask: Mask | None = None,
) -> torch.Tensor:
    """Attention over the sequence and each position's own keys, (B, H, S, C), in the dtype of ``q``.

    Args:
        q: (B, H, S, C).
        k: (B, G, L, C), G dividing H: query heads h // R share a key head. S is 1 or L when there is no mask.
        v: (B, G, L, C).
        own: W keys and values of the queries' own positions, alternating; empty: plain causal attention.
        scale: Factor on the scores.
        mask: Of the sequence only: additive, from :func:`~model.attention.causal.attention_mask`, or blocks, from
            :func:`~model.attention.flex.block_mask`, whose kernel gives ``lse`` a gradient of its own.
    """
    if not own:
        return causal_attention(q, k, v, scale, mask)
    if mask is not None and not isinstance(mask, torch.Tensor):
        from model.attention.flex import windowed_attention_and_lse

        return _joined(*windowed_attention_and_lse(q, k, v, scale, mask), q, own, scale)
    mask = None if mask is None else mask.to(q.dtype)
    kernel = flash_kernel(q, k, v, mask)
    if kernel is None:
        return written_out(q, k, v, own, scale, mask)
    out_BHSC: torch.Tensor = _JointSoftmax.apply(kernel, scale, q, k, v, mask, *own)
    return out_BHSC


def written_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own: OwnKeys,
    scale: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by the definition, S x L scores and all; where there is no kernel, and to test the others against."""
    groups, keys = k.shape[1], k.shape[-2]
    q_BGRSC = _wide(q).unflatten(1, (groups, -1))
    scores = scale * q_BGRSC @ _wide(k).unsqueeze(2).transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.unsqueeze(-3)  # the same for every head: (S, L) or (B, 1, S, L)
    elif is_causal(q, k, mask):
        scores = scores.masked_fill(torch.ones(keys, keys, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    own_scores = [scale * _dot(q_BGRSC, _wide(key)) for key, _ in _pairs(own)]
    weights = torch.cat((scores, torch.stack(own_scores, dim=-1)), dim=-1).softmax(dim=-1)
    out = weights[..., :keys] @ _wide(v).unsqueeze(2)
    for weight, (_, value) in zip(weights[..., keys:].unbind(-1), _pairs(own), strict=True):
        out = out + weight.unsqueeze(-1) * _wide(value).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype)


def _joined(
    sequence_BHSC: torch.Tensor, lse_BHS: torch.Tensor, q: torch.Tensor, own: OwnKeys, scale: float
) -> torch.Tensor:
    """The sequence's part and the rest, joined by operations that autograd knows, (B, H, S, C)."""
    groups = own[0].shape[1]
    q_BGRSC, sequence_BGRSC = (_wide(x).unflatten(1, (groups, -1)) for x in (q, sequence_BHSC))
    lse_BGRS = _wide(lse_BHS).unflatten(1, (groups, -1))
    scores = [scale * _dot(q_BGRSC, _wide(key)) for key, _ in _pairs(own)]
    joint_BGRS = torch.stack((lse_BGRS, *scores)).logsumexp(dim=0)
    out = sequence_BGRSC * (lse_BGRS - joint_BGRS).exp().unsqueeze(-1)
    for score, (_, value) in zip(scores, _pairs(own), strict=True):
        out = torch.addcmul(out, (score - joint_BGRS).exp().unsqueeze(-1), _wide(value).unsqueeze(2))
    joined: torch.Tensor = out.flatten(1, 2).to(q.dtype)
    return joined


class _JointSoftmax(torch.autograd.Function):
    """The kernel's part and the rest, joined; half-precision inputs are joined in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: FlashKernel,
        scale: float,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        groups = k.shape[1]
        sequence = kernel.forward(q, k, v, mask, scale)
        lse_BHS = sequence.lse_BHS[..., : q.shape[-2]]
        lse_BGRS = lse_BHS.unflatten(1, (groups, -1))
        q_BGRSC = _wide(q).unflatten(1, (groups, -1))
        scores = [scale * _dot(q_BGRSC, _wide(key)) for key, _ in _pairs(own)]
        joint_BGRS = torch.stack((lse_BGRS, *scores)).logsumexp(dim=0)
        out = _wide(sequence.out_BHSC).unflatten(1, (groups, -1)) * (lse_BGRS - joint_BGRS).exp().unsqueeze(-1)
        for score, (_, value) in zip(scores, _pairs(own), strict=True):
            out.addcmul_((score - joint_BGRS).exp().unsqueeze(-1), _wide(value).unsqueeze(2))
        out_BHSC: torch.Tensor = out.flatten(1, 2).to(q.dtype)
        # Into the kernel's own buffer: its backward reads the strides and the padding it made itself.
        lse_BHS.copy_(joint_BGRS.flatten(1, 2))
        ctx.kernel, ctx.scale, ctx.n_own = kernel, scale, len(own)
        ctx.save_for_backward(q, k, v, mask, *own, out_BHSC, sequence.lse_BHS, *sequence.rng_state)
        return out_BHSC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, mask, *rest = ctx.saved_tensors
        own, (out, lse, *rng_state) = rest[: ctx.n_own], rest[ctx.n_own :]
        groups, scale = k.shape[1], ctx.scale
        grad_q, grad_k, grad_v = ctx.kernel.backward(
            grad, q, k, v, mask, scale, FlashResult(out, lse, tuple(rng_state))
        )

        q_BGRSC, grad_BGRSC, out_BGRSC, grad_q_BGRSC = (
            _wide(x).unflatten(1, (groups, -1)) for x in (q, grad, out, grad_q)
        )
        joint_BGRS = lse[..., : q.shape[-2]].unflatten(1, (groups, -1))
        delta_BGRS = (grad_BGRSC * out_BGRSC).sum(dim=-1)
        own_gradients: list[torch.Tensor | None] = []
        first_own = len(ctx.needs_input_grad) - len(own)
        for index, (key, value) in enumerate(_pairs(own)):
            key_BGSC, value_BGSC = _wide(key), _wide(value)
            weight = (scale * _dot(q_BGRSC, key_BGSC) - joint_BGRS).exp()
            grad_score = scale * weight * (_dot(grad_BGRSC, value_BGSC) - delta_BGRS)
            grad_q_BGRSC.addcmul_(grad_score.unsqueeze(-1), key_BGSC.unsqueeze(2))
            # Loops that ran without a graph left constants.
            for needed, factor, rows in (
                (ctx.needs_input_grad[first_own + 2 * index], grad_score, q_BGRSC),
                (ctx.needs_input_grad[first_own + 2 * index + 1], weight, grad_BGRSC),
            ):
                own_gradients.append((factor.unsqueeze(-1) * rows).sum(dim=2).to(key.dtype) if needed else None)
        return None, None, grad_q_BGRSC.flatten(1, 2).to(q.dtype), grad_k, grad_v, None, *own_gradients


def _pairs(own: OwnKeys | list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(own[::2], own[1::2], strict=True)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in fp32, or as it is where it is wider: what softmax and its joining are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dot(x_BGRSC: torch.Tensor, y_BGSC: torch.Tensor) -> torch.Tensor:
    """Inner product at each position, (B, G, R, S)."""
    return (x_BGRSC * y_BGSC.unsqueeze(2)).sum(dim=-1)
