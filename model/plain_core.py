r"""The plain core: blocks with an ordinary residual stream, run T times.

    h_(t+1) = h_t + blocks(h_t)

With one loop this is the transformer everybody knows, and with more one whose layers share their weights (Dehghani
et al. 2018, "Universal Transformers"; Lan et al. 2019, ALBERT): no injection, no gate, no step embedding. It is here to
be compared with.

Shapes: B batch, S sequence, D width.
"""

from __future__ import annotations

import torch
from torch import nn

from model.attention import SequenceContext
from model.blocks import BlockCarry
from model.config import IceConfig
from model.loop import LoopedCore


class PlainCore(LoopedCore):
    """Blocks and nothing else."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__(config)
        self.blocks = self.make_blocks()
        if config.initial_state == "learned":
            self.initial_state = nn.Parameter(torch.zeros(config.dim))

    def first_carries(self, h_BSD: torch.Tensor) -> tuple[BlockCarry, ...]:
        """Nothing remembered yet, for each block."""
        return tuple(BlockCarry() for _ in self.blocks)

    def _step(  # type: ignore[override]
        self,
        h_BSD: torch.Tensor,
        carries: tuple[BlockCarry, ...],
        e_BSD: torch.Tensor,
        context: SequenceContext,
        loop: int,
    ) -> tuple[torch.Tensor, tuple[BlockCarry, ...]]:
        new_carries = []
        for layer, (block, carry) in enumerate(zip(self.blocks, carries, strict=True)):
            update_BSD, new_carry = block(h_BSD, self._site(context, layer, loop), carry)
            h_BSD = h_BSD + update_BSD
            new_carries.append(new_carry)
        return h_BSD, tuple(new_carries)
