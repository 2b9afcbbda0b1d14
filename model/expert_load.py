"""How many tokens each expert received, per loop and layer.

Collapse in one loop hides in the sum over loops, so the counts keep the loop axis: int64 (T, recurrent_layers, E).
Routers add to it while training. Activation checkpointing runs a router twice; what it adds while recomputing is
ignored, so every routing decision counts once. All tensors stay on the device: no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ExpertLoad:
    """Accumulates counts between two ``take()`` calls, over any number of forwards and depths."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self.n_layers, self.n_experts = n_layers, n_experts
        self.enabled = True
        self._loop = 0
        self._recomputing = False
        self._counts: dict[tuple[int, int], torch.Tensor] = {}

    def begin_loop(self, loop: int) -> None:
        """What routers add from now on belongs to ``loop``, counted from 0."""
        if not self._recomputing:
            self._loop = loop

    def add(self, layer: int, tokens_per_expert: torch.Tensor) -> None:
        """Add one router's counts, (E,) integers, to ``layer`` of the current loop."""
        if not self.enabled or self._recomputing:
            return
        key = (self._loop, layer)
        counts = tokens_per_expert.detach().long()
        self._counts[key] = self._counts[key] + counts if key in self._counts else counts

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Ignore what is added inside: the forward already counted it."""
        outer, self._recomputing = self._recomputing, True
        try:
            yield
        finally:
            self._recomputing = outer

    def take(self) -> torch.Tensor:
        """The counts since the last take, int64 (loops seen, n_layers, E), and start again from zero."""
        counts, self._counts = self._counts, {}
        loops = 1 + max((loop for loop, _ in counts), default=-1)
        device = next(iter(counts.values())).device if counts else None
        result = torch.zeros(loops, self.n_layers, self.n_experts, dtype=torch.int64, device=device)
        for (loop, layer), count in counts.items():
            result[loop, layer] = count
        return result
