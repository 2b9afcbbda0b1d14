r"""MLCA, the multi-level cache: recent tokens exact, older ones averaged over 2, 4, 8, ... tokens an entry.

    level 0     the newest tokens as they are, at least W of them before every new token
    level l     at most W entries, each the mean of 2^l neighbouring tokens, l = 1 .. L
    level L     also takes everything older: when W entries no longer suffice, they merge in pairs

For an entry of n tokens with mean key k and mean value v the layer computes ``exp(q . k + log n) v``: the logit is the
mean of the n tokens' logits (keys are pooled after their rotation), and ``log n`` gives the entry the attention mass
of n tokens. Where the keys of an entry are equal this *is* exact attention; where they differ it is the first-order
term. mla pools its latents and rotary keys, from which keys and values are linear, so the same holds.

Memory: at most ``(L + 1) W`` entries and a little room, at any length (but for a W smaller than the logarithm of the
length). About ``2^(L+1) W`` tokens are pooled no coarser than 2^L; n tokens no coarser than about ``2 n / W``. Nothing
is dropped. A padding token weighs nothing in a mean and is not counted in n.

What has been pooled depends on the length read before a forward and on nothing else (after a rewind on the longest
length so far), so it is the same for every layer and loop; the tokens of one forward see each other exactly.

Source: the project's specification ("multi-level cache attention"); pooled memory after Rae et al. 2020 (Compressive
Transformers), the count bias after Bolya et al. 2023 (token merging, "proportional attention").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.attention.causal import Memory
from model.attention.slot import CacheSlot, rows_kept
from model.config import IceConfig

if TYPE_CHECKING:
    from model.attention.cache import Cache


@dataclass(frozen=True)
class Pooling:
    """The two numbers of the idea: ``window`` W and ``levels`` L, both at least 1."""

    window: int
    levels: int

    @classmethod
    def of(cls, config: IceConfig) -> Pooling | None:
        """``config``'s, None where the cache is exact."""
        return None if config.mlca_window is None else cls(config.mlca_window, config.mlca_levels)

    @property
    def block(self) -> int:
        """Tokens pooled at a time, an even number: pooling copies the memory, so not for every token."""
        return 2 * max(1, self.window // 8)

    def pooled_tokens(self, length: int, rewindable: int = 0) -> int:
        """How many of the oldest tokens are pooled before a forward that starts at ``length``."""
        return max(0, length - rows_kept(self.window, rewindable)) // self.block * self.block

    def spans(self, tokens: int) -> list[int]:
        """Tokens each entry stands for when the oldest ``tokens`` are pooled, oldest entry first.

        As ``tokens`` grows, neighbouring entries merge and none is ever split.
        """
        newer: list[int] = []  # entries of the levels so far, oldest first
        for level in range(1, self.levels):
            entries = tokens >> level
            # Entries move up in pairs.
            stay = entries if entries <= self.window else self.window - (entries - self.window) % 2
            newer = [1 << level] * stay + newer
            tokens -= stay << level
        # The last level: equal entries, then a remainder in powers of two. Only entries of like size ever merge; one
        # that took in a few tokens at a time would round them away in half precision.
        doublings = 0
        while tokens > (1 << self.levels + doublings) * max(1, self.window - doublings):
            doublings += 1
        whole, rest = divmod(tokens, 1 << self.levels + doublings)
        parts = [1 << bit for bit in reversed(range(self.levels + doublings)) if rest >> bit & 1]
        return [1 << self.levels + doublings] * whole + parts + newer

    def most_rows(self, rewindable: int = 0) -> int:
        """Rows of a slot that is fed token by token, at most, at any length."""
        return self.levels * self.window + rows_kept(self.window, rewindable) + self.block


class PooledSlot(CacheSlot):
    """A slot that pools what a window would forget. Its buffers hold the pooled entries, then the exact tokens."""

    def __init__(self, cache: Cache, pooling: Pooling) -> None:
        super().__init__(cache)
        self.pooling = pooling
        self._spans: list[int] = []
        self._bias_BP: torch.Tensor | None = None

    def append(self, *tensors: torch.Tensor) -> Memory:
        """Pool what has become old, store the new rows, return the whole memory; see :meth:`CacheSlot.append`."""
        pooled = self.pooling.pooled_tokens(self.length, self._cache.rewindable)
        if pooled > sum(self._spans):
            self._pool(pooled, tensors[0].shape[-2])
        return super().append(*tensors)._replace(pooled_bias_BP=self._bias_BP)

    def select_rows(self, rows_B: torch.Tensor) -> None:
        """Row i becomes what row ``rows_B[i]`` was; (B,) int64."""
        super().select_rows(rows_B)
        if self._bias_BP is not None and len(self._bias_BP) > 1:  # one for all rows without padding
            self._bias_BP = self._bias_BP.index_select(0, rows_B.to(self._bias_BP.device))

    def bytes_per_token(self) -> int:
        """0: a pooled slot is bounded."""
        return 0

    def _pool(self, tokens: int, new: int) -> None:
        """Make the oldest ``tokens`` pooled entries, with room for ``new`` rows and until the next time."""
        device, padding_B = self._buffers[0].device, self._cache.padding_B
        newly_pooled = tokens - sum(self._spans)
        old_spans = torch.tensor(self._spans + [1] * newly_pooled, device=device)
        self._spans = self.pooling.spans(tokens)
        spans = torch.tensor(self._spans, device=device)
        old_counts_BR, counts_BP = _real_tokens(old_spans, padding_B), _real_tokens(spans, padding_B)
        # Every new entry is a run of old rows: how long is the run, and what is each row's share of the mean?
        last_P = torch.searchsorted(old_spans.cumsum(0), spans.cumsum(0))
        runs_P = torch.diff(last_P, prepend=last_P.new_tensor([-1]))
        own_counts_BR = counts_BP.clamp_min(1).repeat_interleave(runs_P, dim=1, output_size=len(old_spans))
        shares_BR = old_counts_BR / own_counts_BR
        merged, exact = [], []
        for buffer in self._buffers:
            rows = buffer[:, :, : len(old_spans)].float() * shares_BR[:, None, :, None]
            # One sum a run, along the first dimension; unsafe: the runs' lengths add up by construction.
            sums = torch.segment_reduce(rows.movedim(2, 0).contiguous(), "sum", lengths=runs_P, unsafe=True)
            merged.append(sums.movedim(0, 2).to(buffer.dtype))
            exact.append(buffer[:, :, len(old_spans) : self.length - self._base])
        self._bias_BP = counts_BP.float().log()
        self._renew([merged, exact], base=tokens - len(self._spans), room=max(new, self.pooling.block))


def _real_tokens(spans: torch.Tensor, padding_B: torch.Tensor | None) -> torch.Tensor:
    """How many tokens that are not padding each span has in each row, (B, P), or (1, P) without padding."""
    ends = spans.cumsum(0)
    first = ends - spans if padding_B is None else torch.maximum(ends - spans, padding_B.view(-1, 1))
    return (ends - first).clamp_min(0).view(-1, len(spans))
