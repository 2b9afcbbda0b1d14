r"""RR-SLM's core: a latent refined by the same map until it no longer moves.

    s = norm(h_t + e);   c = s + blocks(s)                     the candidate: self-attention and feed-forward
    g = sigmoid(W [s; c] + b)                                  refinement gate, for each channel
    h_(t+1) = h_t + g * (c - h_t)
    a position has converged once ||h_(t+1) - h_t|| < eps ||h_(t+1)||, and keeps its state from then on

The map is the same in every iteration (no step embedding): "no longer moves" then means a fixed point, which more
iterations would not leave. The update is a convex mixture of a state and a bounded candidate, so h stays bounded at any
depth. Everything is causal and in one pass: a position's context is what its prelude and the latents before it say,
there is no forward for each position.

Convergence is counted, and saves work where nobody waits: all iterations run in training, with experts, and while
decoding with a cache (later tokens must find this token's keys of every iteration), where a converged position only
discards its update; an evaluation without cache ends once every position has converged. eps = 0 never converges.

After the recursive-refinement language model of ``specification/rr-slm.txt``; that the refined latent is one vector for
all positions, and that each position needs a forward of its own, is left behind.

Shapes: B batch, S sequence, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from model.attention import SequenceContext
from model.blocks import BlockCarry
from model.config import IceConfig
from model.init import Linear
from model.loop import LoopedCore, LoopState, relative_change
from model.norm import RMSNorm


class RefineCarry(NamedTuple):
    """What an iteration hands to the next besides the latent."""

    blocks: tuple[BlockCarry, ...]
    running_BS: torch.Tensor  # bool: the position has not converged
    loops_BS: torch.Tensor  # int64: iterations it was given


class RefineCore(LoopedCore):
    """The refinement map and the count of iterations until it settles."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.blocks = self.make_blocks()
        self.gate_proj = Linear(2 * config.dim, config.dim)
        self.gate_bias = nn.Parameter(torch.zeros(config.dim))
        if config.initial_state == "learned":
            self.initial_state = nn.Parameter(torch.zeros(config.dim))

    def first_carries(self, h_BSD: torch.Tensor) -> RefineCarry:
        """Every position runs."""
        running_BS = torch.ones(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)
        return RefineCarry(tuple(BlockCarry() for _ in self.blocks), running_BS, torch.zeros_like(running_BS).long())

    def _step(  # type: ignore[override]
        self, h_BSD: torch.Tensor, carries: RefineCarry, e_BSD: torch.Tensor, context: SequenceContext, loop: int
    ) -> tuple[torch.Tensor, RefineCarry]:
        start_BSD = stream_BSD = self.norm(h_BSD + e_BSD)
        new_carries = []
        for layer, (block, carry) in enumerate(zip(self.blocks, carries.blocks, strict=True)):
            update_BSD, new_carry = block(stream_BSD, self._site(context, layer, loop), carry)
            stream_BSD = stream_BSD + update_BSD
            new_carries.append(new_carry)
        gate_BSD = self.gate_proj(torch.cat((start_BSD, stream_BSD), dim=-1)) + self.gate_bias.to(h_BSD.dtype)
        next_BSD = torch.lerp(h_BSD, stream_BSD, torch.sigmoid(gate_BSD))
        next_BSD = torch.where(carries.running_BS.unsqueeze(-1), next_BSD, h_BSD)
        moved_BS = relative_change(next_BSD, h_BSD) >= self.config.convergence_eps
        loops_BS = carries.loops_BS + carries.running_BS
        return next_BSD, RefineCarry(tuple(new_carries), carries.running_BS & moved_BS, loops_BS)

    def held(self, running_BS1: torch.Tensor, new: RefineCarry, old: RefineCarry) -> RefineCarry:
        """A token whose loops were ended from outside is given no more of them."""
        running_BS = running_BS1.squeeze(-1)
        return new._replace(
            running_BS=torch.where(running_BS, new.running_BS, old.running_BS),
            loops_BS=torch.where(running_BS, new.loops_BS, old.loops_BS),
        )

    def settled(self, carries: RefineCarry) -> bool:
        """Whether every position has converged."""
        return not bool(carries.running_BS.any())

    def moving(self, carries: RefineCarry) -> RefineCarry:
        """As if no position had converged."""
        return carries._replace(running_BS=torch.ones_like(carries.running_BS))

    def measured(self, state: LoopState) -> dict[str, Any]:
        """The iterations each position was given."""
        return {"loops_used_BS": state.carries.loops_BS}
