r"""AEC, adaptive expert caching: a token whose input to the experts has settled reuses their output of an earlier loop.

In loop t, with x_t the input of the feed-forward and c < t the loop in which the token's cached output was computed,

    routed_t = routed_c   if  confidence(x_t) > aec_confidence          the router is sure,
                         and  top-K(x_t) = top-K(x_c)                   of the same experts,
                         and  |x_t - x_c| < aec_drift |x_c|             about nearly the same input,
                         and  t - c <= aec_max_age                      not for too long;
    routed_t = sum_i g_i(x_t) FFN_i(x_t)   otherwise, and c = t
    y_t = routed_t + FFN_shared(x_t)       shared experts see every token in every loop

``confidence``, in [0, 1]: the mean score of the chosen experts for sigmoid scores, the sum of their probabilities for
softmax. The comparisons are strict, so that ``aec_confidence = 1`` or ``aec_drift = 0`` never reuses.

The tokens to compute are gathered, sent through the layer in ONE call, and written over the cached rows. Decisions
carry no gradient; a reused output is the very tensor an earlier loop computed, and its gradient goes there. Nothing is
kept on a module, because a checkpointed loop runs twice: all state is the carry between two loops of one forward. A
token's decisions depend on its own earlier loops only, so decoding decides as the full forward does.

The layer is called once per loop whatever there is to compute, also with no row at all: under expert parallelism that
call is where the all-to-alls are, and they must be equally many on every rank, forward and backward.

Source: the Ice specification, "Adaptive Expert Caching", which gives the first two conditions; drift and age bound what
those let through. Cost, for each core block and loop: one more product with the router's (E, D) matrix, one host
synchronisation (how many rows there are), and 2 D numbers a token of carry.

Shapes: B batch, S sequence, N = B * S tokens, D width, E experts, K experts per token, M tokens computed, 0 <= M <= N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from model import remat
from model.attention import Carry
from model.config import IceConfig
from model.expert_parallel import SELECTION_BIAS, routed_output, router_weight, shared_output
from model.moe import expert_scores, select_experts


class ExpertCarry(NamedTuple):
    """What a loop hands to the next; only ``routed_ND`` has a gradient."""

    routed_ND: torch.Tensor  # the output in use
    input_ND: torch.Tensor  # the x it was computed from
    experts_NK: torch.Tensor  # the experts it came from, ascending
    computed_in_N: torch.Tensor  # int64, the loop it was computed in
    computed_share: torch.Tensor  # scalar fp32, tokens computed / tokens seen, over all loops so far


class _Decision(NamedTuple):
    """What is decided for a loop; a recomputation may be told (``model/remat``)."""

    experts_NK: torch.Tensor  # the router's choice, ascending
    reuse_N: torch.Tensor  # bool
    rows_M: torch.Tensor  # int64, the tokens to compute


class ExpertCache:
    """Calls an MoE layer for the tokens that need it. Holds settings only: no parameter, no buffer, no state."""

    def __init__(self, config: IceConfig) -> None:
        self.config = config

    def __call__(self, layer: nn.Module, x_BSD: torch.Tensor, loop: int, carry: Carry) -> tuple[torch.Tensor, Carry]:
        """The layer's output (B, S, D) for loop number ``loop`` (from 0), and the carry for the next.

        ``carry`` is ``()`` in the first loop, which computes every token.
        """
        x_ND = x_BSD.flatten(0, 1)
        new = self._next_carry(layer, x_ND, loop, ExpertCarry(*carry) if carry else None)
        output_BSD = new.routed_ND.view_as(x_BSD)
        shared_BSD = shared_output(layer, x_BSD)
        return output_BSD if shared_BSD is None else output_BSD + shared_BSD, new

    def computed_share(self, carry: Carry) -> torch.Tensor:
        """Expert rows computed / rows there would be without AEC, over all loops so far; scalar fp32, no gradient."""
        return ExpertCarry(*carry).computed_share

    def _next_carry(self, layer: nn.Module, x_ND: torch.Tensor, loop: int, old: ExpertCarry | None) -> ExpertCarry:
        decision = remat.keep("routes", lambda: self._decide(layer, x_ND.detach(), loop, old))
        if old is None:
            return ExpertCarry(
                routed_output(layer, x_ND),
                x_ND.detach(),
                decision.experts_NK,
                torch.full_like(decision.experts_NK[:, 0], loop),
                torch.ones((), dtype=torch.float32, device=x_ND.device),
            )
        reuse_N, rows_M = decision.reuse_N, decision.rows_M
        # index_select keeps the graph also when it selects nothing, and with it the collectives of the backward.
        computed_MD = routed_output(layer, x_ND.index_select(0, rows_M))
        return ExpertCarry(
            old.routed_ND.index_copy(0, rows_M, computed_MD),
            torch.where(reuse_N.unsqueeze(1), old.input_ND, x_ND.detach()),
            decision.experts_NK,  # of a reused token they are the cached ones
            torch.where(reuse_N, old.computed_in_N, loop),
            old.computed_share + ((~reuse_N).float().mean() - old.computed_share) / (loop + 1),
        )

    @torch.no_grad()
    def _decide(self, layer: nn.Module, x_ND: torch.Tensor, loop: int, old: ExpertCarry | None) -> _Decision:
        experts_NK, confidence_N = self._routing(layer, x_ND)
        if old is None:
            reuse_N = torch.zeros_like(confidence_N, dtype=torch.bool)
        else:
            reuse_N = self._reuse(old, x_ND, experts_NK, confidence_N, loop)
        return _Decision(experts_NK, reuse_N, (~reuse_N).nonzero().squeeze(1))

    def _routing(self, layer: nn.Module, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts the router would choose, ascending (N, K), and how sure of them it is (N,), in [0, 1]."""
        bias_E = getattr(layer.router, SELECTION_BIAS)
        scores_NE = expert_scores(self.config, router_weight(layer), x_ND)
        experts_NK = select_experts(self.config, scores_NE, bias_E)
        chosen_NK = scores_NE.gather(1, experts_NK)
        # Probabilities may add up to more than 1 by rounding.
        confidence_N = chosen_NK.mean(1) if self.config.score_func == "sigmoid" else chosen_NK.sum(1).clamp(max=1)
        return experts_NK.sort(dim=1).values, confidence_N

    def _reuse(
        self, old: ExpertCarry, x_ND: torch.Tensor, experts_NK: torch.Tensor, confidence_N: torch.Tensor, loop: int
    ) -> torch.Tensor:
        """Which tokens need not be computed, (N,) bool. Not a number anywhere: computed."""
        cached_ND = old.input_ND.float()
        moved_N = (x_ND.float() - cached_ND).norm(dim=1)
        reuse_N: torch.Tensor = (
            (confidence_N > self.config.aec_confidence)
            & (experts_NK == old.experts_NK).all(dim=1)
            & (moved_N < self.config.aec_drift * cached_ND.norm(dim=1))
            & (loop - old.computed_in_N <= self.config.aec_max_age)
        )
        return reuse_N
