r"""Lossless self-speculative decoding: draft at a shallow depth, verify at full depth, k + 1 tokens in one pass.

    draft    d_1 ... d_k, d_i ~ q_i     the same weights and the same cache, ``draft_loops`` loops
    verify   p_1 ... p_(k+1)            one full-depth forward over [last token, d_1, ..., d_k]
    place i  with probability min(1, p_i(d_i) / q_i(d_i)) the token is d_i and place i + 1 follows;
             otherwise it is drawn from norm(max(p_i - q_i, 0)), and the rest of the drafts is forgotten;
             after k accepted drafts one more token is drawn from p_(k+1)

Each token is distributed exactly as p (Leviathan et al. 2023, theorem 3.5); greedy distributions are 1 on one id, so
that greedy decoding equals the full depth's token for token. Temperature, top_k and top_p are part of both p and q.

A batch advances as far as its most reluctant row: places are settled in order, and the first at which a row rejected is
the last that is committed, with the draft of each row that accepted and the correction of each that did not. Whether a
place is reached depends on decisions at earlier ones only, so no row's distribution changes. For the same reason the
random numbers of a place may be used again when it is drafted again: nothing committed has seen them.

The draft reads and writes the slots of the prelude, of the loops it runs and of the coda; the verification writes them
again, after a rewind. Cost of a round of k drafts: ``k`` shallow tokens one at a time, and k + 1 deep ones at once,
which cost about one where decoding is bound by reading weights.

Shapes: B batch, V vocabulary, K drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from model.decoding import Batch, NewTokens
from model.depth import DecodingController
from model.sampling import draw, probabilities

# The random numbers of a place: for the draft, for its acceptance, for what is drawn in its stead (or after it).
KINDS_OF_UNIFORMS = 3


class Draft(NamedTuple):
    """A proposed token of each row."""

    ids_B: torch.Tensor
    q_BV: torch.Tensor  # the distribution it was drawn from
    loops_B: torch.Tensor


def settle(
    p_BV: torch.Tensor, draft: Draft, acceptance_B: torch.Tensor, correction_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of one place, (B,) distributed as ``p``, and whether it is the draft, (B,) bool.

    Args:
        p_BV: The full depth's distribution.
        draft: Drawn from its ``q_BV``.
        acceptance_B: Uniform numbers that decide whether the draft is accepted.
        correction_B: Uniform numbers that draw a token in its place.
    """
    ids_B1 = draft.ids_B.unsqueeze(1)
    accepted_B = acceptance_B < (p_BV.gather(1, ids_B1) / draft.q_BV.gather(1, ids_B1)).squeeze(1)
    missing_BV = (p_BV - draft.q_BV).clamp_min(0)
    # Where p = q up to rounding nothing is missing, and nothing is rejected but by rounding.
    missing_BV = torch.where(missing_BV.sum(dim=1, keepdim=True) > 0, missing_BV, p_BV)
    return torch.where(accepted_B, draft.ids_B, draw(missing_BV, correction_B)), accepted_B


def decode_speculatively(
    batch: Batch,
    prompt_BS: torch.Tensor,
    max_new_tokens: int,
    draft_tokens: int,
    draft_loops: int,
    controller: DecodingController | None = None,
) -> Iterator[NewTokens]:
    """Yield up to ``max_new_tokens`` tokens of each sequence; what remains of a round is never more than asked for.

    Args:
        batch: The sequences; their cache rewinds ``draft_tokens``.
        prompt_BS: The prompts, padded at the left.
        max_new_tokens: Tokens at most.
        draft_tokens: Drafts of a round, k.
        draft_loops: Depth of drafts.
        controller: Ends the loops of a draft before ``draft_loops``; None: all run that many.
    """
    full_B = torch.full_like(prompt_BS[:, 0], batch.n_loops)
    p_BV = probabilities(batch.read_prompt(prompt_BS), batch.sampling)
    new = batch.commit(draw(p_BV, batch.uniforms.at(0)[2]), full_B)
    yield new
    while batch.place < max_new_tokens and not batch.all_ended():
        start, first = batch.cache.length, batch.place
        # The pass commits one token more than its accepted drafts.
        drafts = _draft(batch, new.ids_B, min(draft_tokens, max_new_tokens - first - 1), draft_loops, controller)
        unread_BS = torch.stack([new.ids_B, *(draft.ids_B for draft in drafts)], dim=1)
        logits_BSV = batch.read(unread_BS, batch.n_loops)
        batch.passes += 1
        for number in range(len(drafts) + 1):
            p_BV = probabilities(logits_BSV[:, number], batch.sampling)
            _, acceptance_B, correction_B = batch.uniforms.at(batch.place)
            if number == len(drafts):
                new, goes_on = batch.commit(draw(p_BV, correction_B), full_B), False
            else:
                draft = drafts[number]
                ids_B, accepted_B = settle(p_BV, draft, acceptance_B, correction_B)
                batch.count_drafts(accepted_B)
                goes_on = bool((accepted_B | batch.ended_B).all())
                new = batch.commit(ids_B, torch.where(accepted_B, draft.loops_B, full_B))
            yield new
            if not goes_on or batch.all_ended():
                break
        batch.cache.rewind(start + batch.place - first)


def _draft(
    batch: Batch, last_B: torch.Tensor, count: int, draft_loops: int, controller: DecodingController | None
) -> list[Draft]:
    """``count`` tokens after ``last_B``, which is not read yet; the cache is left as it was."""
    drafts: list[Draft] = []
    with batch.cache.drafting():
        for number in range(count):
            q_BV = probabilities(batch.read(last_B.unsqueeze(1), draft_loops, controller)[:, -1], batch.sampling)
            batch.draft_passes += 1
            last_B = draw(q_BV, batch.uniforms.at(batch.place + number)[0])
            loops_B = torch.full_like(last_B, draft_loops) if controller is None else controller.loops_BS[:, -1]
            drafts.append(Draft(last_B, q_BV, loops_B))
    return drafts
