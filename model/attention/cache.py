"""What decoding remembers: one slot per (layer, loop), since a looped layer sees another state in every loop.

A slot holds whatever its attention appends (gqa: keys and values; mla: the latent with the shared rotary key) in
buffers that double when full. The cache's ``length`` is the only position there is: attention reads where to write
and where its queries start from it, and the model advances it once at the end of a forward.

Memory: ``bytes_per_token() * length * batch``, up to twice that while buffers grow.
"""

from __future__ import annotations

import torch

SlotKey = tuple[str, int, int]  # (part, layer, loop)


class CacheSlot:
    """The remembered tensors of one attention layer in one loop."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._buffers: list[torch.Tensor] = []

    @property
    def length(self) -> int:
        """Tokens remembered before this forward: the position of its first query."""
        return self._cache.length

    def append(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Store new rows and return, for each tensor, everything so far.

        Args:
            tensors: Each (B, heads, S, width); the same number and widths in every call.

        Returns:
            Views (B, heads, length + S, width), in the same order.
        """
        start = self.length
        end = start + tensors[0].shape[-2]
        if not self._buffers:
            self._buffers = [_allocate(tensor, end) for tensor in tensors]
        elif self._buffers[0].shape[-2] < end:
            self._buffers = [_grow(buffer, start, end) for buffer in self._buffers]
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            buffer[:, :, start:end] = tensor
        return [buffer[:, :, :end] for buffer in self._buffers]

    def bytes_per_token(self) -> int:
        """Bytes one token of one sequence takes in this slot."""
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in self._buffers)


class Cache:
    """The slots of one batch of sequences, all of the same length. Used for one depth only."""

    def __init__(self) -> None:
        self.length = 0
        self.n_loops: int | None = None
        self._slots: dict[SlotKey, CacheSlot] = {}

    def slot(self, part: str, layer: int, loop: int = 0) -> CacheSlot:
        """The slot of ``layer`` of ``part`` ("prelude", "core", "coda") in ``loop``; made on first use."""
        return self._slots.setdefault((part, layer, loop), CacheSlot(self))

    def fix_depth(self, n_loops: int) -> None:
        """Remember the depth at first use; a later, different one has no states to attend to and is refused."""
        if self.n_loops not in (None, n_loops):
            raise ValueError(f"n_loops = {n_loops}: this cache was filled with n_loops = {self.n_loops}")
        self.n_loops = n_loops

    def bytes_per_token(self) -> int:
        """Bytes one token of one sequence takes over all layers and loops; 0 before the first forward."""
        return sum(slot.bytes_per_token() for slot in self._slots.values())


def _allocate(tensor: torch.Tensor, capacity: int) -> torch.Tensor:
    return tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])


def _grow(buffer: torch.Tensor, used: int, needed: int) -> torch.Tensor:
    grown = _allocate(buffer, max(needed, 2 * buffer.shape[-2]))
    grown[:, :, :used] = buffer[:, :, :used]
    return grown
