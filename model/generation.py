"""Text generation with a cache per loop: the prompt is read once, then one token at a time.

A token's state at loop t attends to the earlier tokens' states *at loop t*, so the cache keeps a slot for each loop and
the result equals a full forward over the whole text. Batches hold prompts of equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.attention import Cache

if TYPE_CHECKING:
    from model.looped_lm import IceModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits. Temperature 0 takes the most likely one."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}: must be at least 0 (0: greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be above 0 and at most 1")


def sample(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """One token id per row, (B,) int64.

    top_k keeps the k most likely ids; top_p the smallest set of most likely ids whose probability reaches p (the most
    likely one is always kept); both apply after the temperature.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        kth_best = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_best, float("-inf"))
    probabilities_BV = logits_BV.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, ids = probabilities_BV.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        probabilities_BV = torch.zeros_like(ordered).scatter_(1, ids, ordered.masked_fill(beyond, 0.0))
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(1)


def stream(
    model: IceModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    n_loops: int | None = None,
    stop_token_ids: Collection[int] = (),
) -> Iterator[torch.Tensor]:
    """Yield the next ids, (B,) int64, until ``max_new_tokens`` or until every sequence has met a stop id.

    A sequence that has met a stop id goes on repeating it, so that the batch stays rectangular. The model is in
    evaluation mode while the iterator runs and back in its own mode afterwards.

    Args:
        model: The model.
        input_ids: Prompts of equal length, (B, S) int64, S at least 1.
        max_new_tokens: At most ``config.max_output_tokens``, and S + max_new_tokens at most ``config.max_seq_len``.
        sampling: How to draw.
        n_loops: Depth; None: ``config.max_loop_iters``.
        stop_token_ids: Ids that end a sequence; the id itself is yielded.

    Raises:
        ValueError: When a limit is exceeded or the prompt is empty; raised here, before the first token is asked for.
    """
    config = model.config
    length = input_ids.shape[1]
    if length < 1:
        raise ValueError("input_ids: the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if max_new_tokens > config.max_output_tokens:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: must be at most max_output_tokens = {config.max_output_tokens}"
        )
    if length + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: with {length} prompt tokens passes max_seq_len = {config.max_seq_len}"
        )
    return _stream(model, input_ids, max_new_tokens, sampling, n_loops, stop_token_ids)


def _stream(
    model: IceModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    n_loops: int | None,
    stop_token_ids: Collection[int],
) -> Iterator[torch.Tensor]:
    device = input_ids.device
    generator = None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)
    stop_ids = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=device)
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)
    cache = Cache()
    unread, new_ids = input_ids, input_ids[:, -1]
    for _ in range(max_new_tokens):
        logits_BV = _next_logits(model, unread, n_loops, cache)
        new_ids = torch.where(finished, new_ids, sample(logits_BV, sampling, generator))
        yield new_ids
        if stop_token_ids:
            finished = finished | torch.isin(new_ids, stop_ids)
            if bool(finished.all()):
                return
        unread = new_ids.unsqueeze(1)


@torch.no_grad()
def _next_logits(model: IceModel, unread_ids: torch.Tensor, n_loops: int | None, cache: Cache) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        logits_BSV: torch.Tensor = model(unread_ids, n_loops, cache=cache)
        return logits_BSV[:, -1]
    finally:
        model.train(was_training)


def generate(
    model: IceModel,
    input_ids: torch.Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    n_loops: int | None = None,
    stop_token_ids: Collection[int] = (),
    on_token: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The prompts with their continuations, (B, S + new) int64. Arguments and errors as in :func:`stream`.

    ``on_token`` is called with each (B,) tensor of new ids as it is drawn.
    """
    pieces = [input_ids]
    for new_ids in stream(model, input_ids, max_new_tokens, sampling, n_loops=n_loops, stop_token_ids=stop_token_ids):
        if on_token is not None:
            on_token(new_ids)
        pieces.append(new_ids.unsqueeze(1))
    return torch.cat(pieces, dim=1)
