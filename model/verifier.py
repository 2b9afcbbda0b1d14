r"""Apex's verifier: how likely a step's refinement is to be right, learned from what turned out to be right.

    z = W_2 silu(W_1 norm(f) + b_1) + b_2       f a step's refinement; two logits a token
    score = sigmoid(z_0)                        P(the most likely next token, read after this step, is the right one)
    gain  = sigmoid(z_1)                        P(one more step lowers the token's loss by a margin)

The architecture's description asks for one more loss, "encourage high scores". A verifier trained by that alone says 1
to everything. So each logit comes in two versions of the same value, whose gradients go to different places:

    judged     the refinement is a constant     the verifier's weights learn measured correctness and benefit, and
                                                nothing else: no other loss moves them
    hoped      the weights are constants        a refinement is moved towards what a calibrated verifier finds right

What is fed back into the memory is the hoped score, so that the language model's own loss cannot move the verifier
either. Calibration: ``model/calibration.py``.

Shapes: B batch, S sequence, D width, H hidden width, T steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.init import matrix_std

CORRECT, GAIN = 0, 1  # the two logits


class Verdict(NamedTuple):
    """What one step says for itself; fp32."""

    judged_BS2: torch.Tensor  # logits, gradients for the verifier's weights alone
    hoped_BS: torch.Tensor  # the logit of correctness, gradients for the refinement alone
    consistency_BS: torch.Tensor  # mean square of proposal - refinement, and of review - refinement, added


class RefinementTrace(NamedTuple):
    """The verdicts of all steps; fp32."""

    judged_TBS2: torch.Tensor
    hoped_TBS: torch.Tensor
    consistency_BS: torch.Tensor  # mean over steps


def trace_of(verdicts: tuple[Verdict, ...]) -> RefinementTrace:
    """The verdicts of steps 1 to T together."""
    judged, hoped, consistency = (torch.stack(field) for field in zip(*verdicts, strict=True))
    return RefinementTrace(judged, hoped, consistency.mean(dim=0))


class Verifier(nn.Module):
    """A small network on the normalised refinement; computes in fp32 (its parameters are rounded in a 16-bit run)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        hidden = max(64, dim // 4)
        self.eps = eps
        self.input_weight = nn.Parameter(torch.empty(hidden, dim))
        self.input_bias = nn.Parameter(torch.zeros(hidden))
        self.output_weight = nn.Parameter(torch.empty(2, hidden))
        self.output_bias = nn.Parameter(torch.zeros(2))
        nn.init.normal_(self.input_weight, std=matrix_std(dim))
        nn.init.normal_(self.output_weight, std=matrix_std(hidden))

    def judge(self, refinement_BSD: torch.Tensor) -> torch.Tensor:
        """Both logits (B, S, 2); gradients reach the weights alone."""
        weights = (self.input_weight, self.input_bias, self.output_weight, self.output_bias)
        return self._logits(refinement_BSD.detach(), *weights)

    def hope(self, refinement_BSD: torch.Tensor) -> torch.Tensor:
        """The logit of correctness (B, S); gradients reach the refinement alone."""
        weights = (self.input_weight, self.input_bias, self.output_weight, self.output_bias)
        # Copies: a view that the backward keeps would pin what ZeRO-3 gathered.
        return self._logits(refinement_BSD, *(weight.detach().clone() for weight in weights))[..., CORRECT]

    def _logits(
        self, x_BSD: torch.Tensor, w_HD: torch.Tensor, b_H: torch.Tensor, w_2H: torch.Tensor, b_2: torch.Tensor
    ) -> torch.Tensor:
        normed_BSD = F.rms_norm(x_BSD.float(), x_BSD.shape[-1:], eps=self.eps)
        hidden_BSH = F.silu(F.linear(normed_BSD, w_HD.float(), b_H.float()))
        return F.linear(hidden_BSH, w_2H.float(), b_2.float())
