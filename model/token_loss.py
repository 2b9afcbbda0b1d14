r"""The cross-entropy of each token, whole or with logits that exist for a few tokens at a time.

    loss_n = logsumexp_v(w_v . x_n) - w_y . x_n,        y = target of token n;  0 where the target is ignored

Of a model with V ids, N tokens have N V logits: at 8k tokens and V = 131072 that is 4.3 GB in fp32, and as much again
for their gradient, more than all boundary states of a loop. Chunked, the product with the head, the logarithm and the
choice are made for ``chunk`` tokens and forgotten but for each token's logsumexp. The backward makes a chunk's logits
again, turns them into ``g_n (softmax - onehot)`` in place, and adds up both products::

    dx_n = g_n (p_n - 1_y) W,        dW = sum_n g_n (p_n - 1_y)^T x_n

Memory: ``chunk * V`` numbers in fp32, whatever N is, and dW in fp32 where the head is in 16 bits (a sum over chunks
rounded each time would lose what single chunks add). Cost: one product with the head more, 4 instead of 3. The loss
stays one number a token, so that what weighs tokens (contrastive depth learning, ignored targets) works on top.

The idea is Wijmans et al. 2024 ("Cut Your Losses") and Liger's fused linear cross-entropy, which computes gradients in
the forward and so cannot weigh tokens afterwards; here it is plain torch. The autograd node keeps the weight itself,
not a transposed view: under ZeRO-3 a view would pin the gathered matrix until the backward.

Shapes: B batch, S sequence, N = B * S tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_TARGET = -100


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross-entropy in nats of each position, (B, S) fp32; 0 where the target is ``IGNORED_TARGET``."""
    losses = F.cross_entropy(
        logits_BSV.float().flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
    )
    return losses.view_as(targets_BS)


def chunked_token_losses(x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, chunk: int) -> Tensor:
    """:func:`token_losses` of ``x W^T``, (B, S) fp32, with the logits of ``chunk`` tokens at a time."""
    losses_N: Tensor = _ChunkedLinearLoss.apply(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten(), chunk)
    return losses_N.view_as(targets_BS)


@torch.no_grad()
def token_outcomes(x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Each token's loss (B, S) fp32, and whether its target was the most likely id, bool; no gradients.

    Ignored targets have loss 0 and are never right. The logits of ``chunk`` tokens exist at a time.
    """
    losses, correct = [], []
    for x_CD, targets_C in zip(x_BSD.flatten(0, 1).split(chunk), targets_BS.flatten().split(chunk), strict=True):
        logits_CV = F.linear(x_CD, weight_VD).float()
        losses.append(F.cross_entropy(logits_CV, targets_C, ignore_index=IGNORED_TARGET, reduction="none"))
        correct.append(logits_CV.argmax(dim=-1) == targets_C)
    return torch.cat(losses).view_as(targets_BS), torch.cat(correct).view_as(targets_BS)


class _ChunkedLinearLoss(torch.autograd.Function):
    """Losses (N,) fp32 of x (N, D) and the head's weight (V, D)."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        chosen_N = targets_N.clamp_min(0)
        logsumexp_N = torch.empty(targets_N.shape, dtype=torch.float32, device=x_ND.device)
        target_logit_N = torch.empty_like(logsumexp_N)
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(x_ND[part], weight_VD).float()
            logsumexp_N[part] = logits_CV.logsumexp(dim=-1)
            target_logit_N[part] = logits_CV.gather(1, chosen_N[part].unsqueeze(1)).squeeze(1)
            del logits_CV  # before the next chunk's are made
        ctx.save_for_backward(x_ND, weight_VD, targets_N, logsumexp_N)
        ctx.chunk = chunk
        return (logsumexp_N - target_logit_N).masked_fill_(targets_N == IGNORED_TARGET, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_ND, weight_VD, targets_N, logsumexp_N = ctx.saved_tensors
        grads_N = grads[0].masked_fill(targets_N == IGNORED_TARGET, 0.0)
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(targets_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            error_CV = F.linear(x_ND[part], weight_VD).float()
            error_CV.sub_(logsumexp_N[part].unsqueeze(1)).exp_()
            index_C1 = targets_N[part].clamp_min(0).unsqueeze(1)
            error_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=torch.float32))
            error_CV = error_CV.mul_(grads_N[part].unsqueeze(1)).to(x_ND.dtype)
            grad_x_ND[part] = error_CV @ weight_VD
            if weight_VD.dtype == torch.float32:
                grad_weight_VD.addmm_(error_CV.T, x_ND[part])
            else:
                grad_weight_VD += error_CV.T @ x_ND[part]
            del error_CV
        return grad_x_ND, grad_weight_VD.to(weight_VD.dtype), None, None
