"""A batch of sequences while they are continued, and the plain way to do it: read one token, draw the next.

The prompt is read once, at full depth, a chunk at a time; what was read is in the cache and never read again. Rows
advance together; one that has met a stop id repeats it, so that the batch stays rectangular.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from model.attention import Cache
from model.depth import DecodingController
from model.sampling import Sampling, Uniforms, draw, probabilities

if TYPE_CHECKING:
    from model.looped_lm import IceModel


# Tokens of a prompt that are read at once: bounds the activations of a long one. Large enough to keep a GPU busy.
PROMPT_CHUNK = 2048


class NewTokens(NamedTuple):
    """One more token of each sequence."""

    ids_B: torch.Tensor  # int64
    loops_B: torch.Tensor  # int64, loops of the forward whose logits the token was drawn from


@dataclass(frozen=True)
class GenerationStatistics:
    """What a generation cost. Tokens after a sequence's stop id do not count.

    Attributes:
        new_tokens: Over all sequences, stop ids included.
        mean_loops: Mean over those of ``NewTokens.loops_B``; 0 before the first.
        passes: Forwards that committed tokens, the prompt's included.
        draft_passes: Shallow forwards of speculative decoding.
        tokens_per_pass: New tokens of a sequence for each pass: 1 unless speculating.
        acceptance_rate: Accepted share of the drafts that were examined (those after a rejection are not); None
            without drafts.
    """

    new_tokens: int
    mean_loops: float
    passes: int
    draft_passes: int
    tokens_per_pass: float
    acceptance_rate: float | None


class Batch:
    """The model, its cache, and how far each sequence has come.

    Args:
        model: The model; each forward runs in evaluation mode, and the model is in its own mode again afterwards.
        cache: Empty.
        padding_B: Tokens at the left of each prompt that are padding; None: none.
        n_loops: Full depth.
        sampling: How tokens are drawn.
        uniforms: The random numbers for it.
        stop_token_ids: Ids that end a sequence.
    """

    def __init__(
        self,
        model: IceModel,
        cache: Cache,
        padding_B: torch.Tensor | None,
        n_loops: int,
        sampling: Sampling,
        uniforms: Uniforms,
        stop_token_ids: Collection[int],
    ) -> None:
        self.cache, self.n_loops, self.sampling, self.uniforms = cache, n_loops, sampling, uniforms
        self.place = 0  # new tokens of each sequence so far
        self.passes = self.draft_passes = 0
        self._model, self._padding_B = model, padding_B
        self._stop_ids = sorted(stop_token_ids)
        self._ids_B = self.ended_B = self.lengths_B = torch.empty(0)
        # Sums stay on the device until someone asks: decoding waits for it no more than it must.
        self._sums = {name: torch.zeros((), dtype=torch.int64) for name in ("loops", "examined", "accepted")}

    @torch.no_grad()
    def read(
        self,
        ids_BS: torch.Tensor,
        n_loops: int,
        controller: DecodingController | None = None,
        *,
        only_last: bool = False,
    ) -> torch.Tensor:
        """Logits (B, S, V) of the next tokens, or (B, 1, V) of the last; the cache remembers them."""
        if controller is not None:
            controller.ended_B = self.ended_B
        was_training = self._model.training
        if was_training:
            self._model.eval()
        try:
            logits_BSV: torch.Tensor = self._model(
                ids_BS, n_loops, cache=self.cache, padding=self._padding_B, controller=controller, only_last=only_last
            )
            return logits_BSV
        finally:
            if was_training:
                self._model.train()

    def read_prompt(self, ids_BS: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the first new token."""
        batch, device = ids_BS.shape[0], ids_BS.device
        self._ids_B = ids_BS[:, -1]
        self.ended_B = torch.zeros(batch, dtype=torch.bool, device=device)
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self.passes += 1
        for chunk_BS in ids_BS.split(PROMPT_CHUNK, dim=1):
            logits_BSV = self.read(chunk_BS, self.n_loops, only_last=True)
        return logits_BSV[:, -1]

    def commit(self, ids_B: torch.Tensor, loops_B: torch.Tensor) -> NewTokens:
        """Make ``ids_B`` the next tokens of the sequences that have not ended."""
        self._ids_B = torch.where(self.ended_B, self._ids_B, ids_B)
        self.place += 1
        self.lengths_B = self.lengths_B + ~self.ended_B
        self._add("loops", loops_B.masked_fill(self.ended_B, 0))
        if self._stop_ids:
            stop_ids = torch.tensor(self._stop_ids, device=ids_B.device)
            self.ended_B = self.ended_B | torch.isin(self._ids_B, stop_ids)
        return NewTokens(self._ids_B, loops_B)

    def count_drafts(self, accepted_B: torch.Tensor) -> None:
        """Remember for the statistics which drafts of one place were accepted."""
        self._add("examined", ~self.ended_B)
        self._add("accepted", accepted_B & ~self.ended_B)

    def all_ended(self) -> bool:
        """Whether every sequence has met a stop id."""
        return bool(self._stop_ids) and bool(self.ended_B.all())

    def statistics(self) -> GenerationStatistics:
        """What it has cost so far."""
        loops, examined, accepted = (int(self._sums[name]) for name in ("loops", "examined", "accepted"))
        new_tokens = int(self.lengths_B.sum())
        return GenerationStatistics(
            new_tokens=new_tokens,
            mean_loops=loops / max(new_tokens, 1),
            passes=self.passes,
            draft_passes=self.draft_passes,
            tokens_per_pass=self.place / max(self.passes, 1),
            acceptance_rate=accepted / examined if examined else None,
        )

    def _add(self, name: str, values_B: torch.Tensor) -> None:
        self._sums[name] = self._sums[name].to(values_B.device) + values_B.sum()


def decode_one_by_one(
    batch: Batch, prompt_BS: torch.Tensor, max_new_tokens: int, controller: DecodingController | None = None
) -> Iterator[NewTokens]:
    """Yield up to ``max_new_tokens`` tokens of each sequence, each read as deep as ``controller`` says."""
    logits_BV = batch.read_prompt(prompt_BS)
    loops_B = torch.full_like(prompt_BS[:, 0], batch.n_loops)
    while True:
        (uniform_B,) = batch.uniforms.at(batch.place)
        new = batch.commit(draw(probabilities(logits_BV, batch.sampling), uniform_B), loops_B)
        yield new
        if batch.place == max_new_tokens or batch.all_ended():
            return
        logits_BV = batch.read(new.ids_B.unsqueeze(1), batch.n_loops, controller)[:, -1]
        batch.passes += 1
        if controller is not None:
            loops_B = controller.loops_BS[:, -1]
