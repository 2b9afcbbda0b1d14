r"""Ice's core: blocks whose update joins a linear system that always decays.

    u = norm(h_t + e) + step(t)
    h_(t+1) = A * h_t + B * e + F,    F = blocks(u) - u   (the blocks' update; their residual stream is not added again)

The blocks may hold experts, and the switches of ``IceConfig`` add what remembers, adapts and halts.

Shapes: B batch, S sequence, D width, T loops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from model.attention import SequenceContext
from model.blocks import Block, BlockCarry
from model.config import IceConfig
from model.expert_load import ExpertLoad
from model.halting import Halting
from model.injection import StableInjection
from model.loop import LoopedCore, LoopState
from model.lora import GatedDepthLoRA
from model.norm import RMSNorm
from model.step_embedding import LoopStepEmbedding


class IceInputs(NamedTuple):
    """What every loop of one forward is given, besides the state."""

    e_BSD: torch.Tensor
    decay_D: torch.Tensor
    drive_BSD: torch.Tensor
    context: SequenceContext


class IceCore(LoopedCore):
    """The recurrent blocks and everything that happens once per loop.

    Args:
        config: The model.
        part: The core's name in the decoding cache.
        expert_load: Where the routers count; None: a counter of its own.
        first_load_layer: Index of the first block's router in ``expert_load``.
    """

    def __init__(
        self, config: IceConfig, part: str = "core", expert_load: ExpertLoad | None = None, first_load_layer: int = 0
    ) -> None:
        super().__init__(config, part, expert_load)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.step_embedding = LoopStepEmbedding(config.dim)
        self.injection = StableInjection(config.dim)
        self.blocks = self.make_blocks(first_load_layer)
        if config.lora_rank:
            self.adapters = nn.ModuleList(GatedDepthLoRA(config) for _ in range(config.recurrent_layers))
        self.halting = Halting(config) if config.act else None
        if config.initial_state == "learned":
            self.initial_state = nn.Parameter(torch.zeros(config.dim))

    def inputs(self, e_BSD: torch.Tensor, context: SequenceContext) -> IceInputs:
        """The encoded input, and the linear system's decay and drive."""
        decay, drive = self.injection()
        return IceInputs(e_BSD, decay.to(e_BSD.dtype), drive.to(e_BSD.dtype) * e_BSD, context)

    def first_carries(self, h_BSD: torch.Tensor) -> tuple[BlockCarry, ...]:
        """Nothing remembered yet, for each block."""
        return tuple(BlockCarry() for _ in self.blocks)

    def _step(  # type: ignore[override]
        self,
        h_BSD: torch.Tensor,
        carries: tuple[BlockCarry, ...],
        e_BSD: torch.Tensor,
        decay_D: torch.Tensor,
        drive_BSD: torch.Tensor,
        context: SequenceContext,
        loop: int,
    ) -> tuple[torch.Tensor, tuple[BlockCarry, ...]]:
        stream_BSD = self.norm(h_BSD + e_BSD) + self.step_embedding(loop).to(h_BSD.dtype)
        next_BSD = torch.addcmul(drive_BSD, decay_D, h_BSD)
        new_carries = []
        for layer, (block, carry) in enumerate(zip(self.blocks, carries, strict=True)):
            if self.config.lora_rank:
                update_BSD = self.adapters[layer](stream_BSD, loop)
                stream_BSD, next_BSD = stream_BSD + update_BSD, next_BSD + update_BSD
            update_BSD, new_carry = block(stream_BSD, self._site(context, layer, loop), carry)
            new_carries.append(new_carry)
            next_BSD = next_BSD + update_BSD
            if layer + 1 < len(self.blocks):
                stream_BSD = stream_BSD + update_BSD
        return next_BSD, tuple(new_carries)

    def measured(self, state: LoopState) -> dict[str, Any]:
        """The share of expert outputs that were computed rather than reused (AEC)."""
        shares = [
            block.expert_cache.computed_share(carry.experts)
            for block, carry in zip(self.blocks, state.carries, strict=True)
            if isinstance(block, Block) and block.expert_cache is not None
        ]
        return {"expert_share": torch.stack(shares).mean()} if shares else {}
