"""A cache slot: what one attention layer remembers in one loop.

A slot holds whatever its attention appends (gqa: keys and values; mla: the latent with the shared rotary key) as one
buffer a tensor, with room at the end, so that a token is written in place and nothing is copied until the room is used
up. Positions come from the cache's ``length`` alone: a slot called twice at the same length (two loops that share it)
overwrites its newest rows, and setting the length back forgets them.

With a sliding ``window`` a slot keeps the ``window - 1`` tokens a next query still sees and those a rewind may ask for
again; older ones go when room is made. A prompt is held whole during its own forward, so a long one is best fed in
chunks (``model/scoring.py`` does).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from model.attention.causal import Memory

if TYPE_CHECKING:
    from model.attention.cache import Cache


class CacheSlot:
    """The remembered tensors of one attention layer in one loop; with a ``window``, only the latest that many."""

    def __init__(self, cache: Cache, window: int | None = None) -> None:
        self._cache, self.window = cache, window
        self._buffers: list[torch.Tensor] = []  # each (B, heads, rows, width)
        self._base = 0  # the token at position p is row p - _base of the buffers

    @property
    def length(self) -> int:
        """Tokens read before this forward: the position of its first query."""
        return self._cache.length

    def append(self, *tensors: torch.Tensor) -> Memory:
        """Store the new tokens' rows and return everything the new tokens may attend to.

        Args:
            tensors: Each (B, heads, S, width); the same number and widths in every call.
        """
        start, new = self.length, tensors[0].shape[-2]
        if not self._buffers:
            assert start == 0, "a slot is filled from the first token on"
            self._renew([tensors], base=0, room=0)
        else:
            if self._buffers[0].shape[-2] < start + new - self._base:
                self._make_room(start, new)
            rows = slice(start - self._base, start - self._base + new)
            for buffer, tensor in zip(self._buffers, tensors, strict=True):
                buffer[:, :, rows] = tensor
        # A query at `start` sees window - 1 tokens before itself.
        oldest = self._base if self.window is None else max(start - self.window + 1, self._base)
        seen = slice(oldest - self._base, start + new - self._base)
        return Memory(tuple(buffer[:, :, seen] for buffer in self._buffers))

    def newest(self, count: int) -> tuple[torch.Tensor, ...]:
        """The rows of the ``count`` tokens this forward has appended: views, each (B, heads, count, width)."""
        start = self.length - self._base
        return tuple(buffer[:, :, start : start + count] for buffer in self._buffers)

    def select_rows(self, rows_B: torch.Tensor) -> None:
        """Row i becomes what row ``rows_B[i]`` was; (B,) int64."""
        self._buffers = [buffer.index_select(0, rows_B.to(buffer.device)) for buffer in self._buffers]

    def bytes_per_token(self) -> int:
        """Bytes by which one more token of one sequence makes this slot grow in the long run."""
        return 0 if self.window is not None else self._bytes_per_row()

    def bytes_used(self) -> int:
        """Bytes of the slot's buffers, unused room included."""
        return sum(b.numel() * b.element_size() for b in self._buffers)

    def _bytes_per_row(self) -> int:
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in self._buffers)

    def _make_room(self, start: int, new: int) -> None:
        oldest = self._base
        if self.window is not None:
            oldest = max(start - rows_kept(self.window, self._cache.rewindable), oldest)
        kept = [buffer[:, :, oldest - self._base : start - self._base] for buffer in self._buffers]
        self._renew([kept], base=oldest, room=max(new, spare_rows(start - oldest)))

    def _renew(self, pieces: Sequence[Sequence[torch.Tensor]], base: int, room: int) -> None:
        """New buffers: the rows of ``pieces`` one after the other, then ``room`` empty rows."""
        self._buffers = [
            torch.cat((*rows, rows[0].new_empty(*rows[0].shape[:2], room, rows[0].shape[3])), dim=2)
            for rows in zip(*pieces, strict=True)
        ]
        self._base = base


def rows_kept(window: int, rewindable: int = 0) -> int:
    """Tokens before the next one that a slot with ``window`` must not forget."""
    return window - 1 + rewindable


def spare_rows(kept: int) -> int:
    """Empty rows beside ``kept`` ones: a quarter, so that a growing slot copies each row four times on average."""
    return kept // 4 + 1


def most_rows(window: int, rewindable: int = 0) -> int:
    """Rows of a slot with ``window`` that is fed token by token, at any length from there on."""
    kept = rows_kept(window, rewindable)
    return kept + spare_rows(kept)
