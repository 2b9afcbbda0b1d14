r"""The looped core: T passes through the same blocks, inside ONE module's forward.

    u = norm(h_t + e) + step(t)
    h_(t+1) = A * h_t + B * e + F,    F = blocks(u) - u   (the blocks' update; their residual stream is not added again)

One forward for the whole loop is what lets ZeRO-3 treat the core as a leaf: its parameters are gathered once per
forward and once per backward, whatever T is.

``grad_loops = k`` runs the first T - k loops without a graph (truncated backpropagation: the gradient of the last k
loops with h_(T-k) as a constant). ``sequence_loops`` gives each sequence its own depth: all run T loops, a sequence's
state stops changing after its own.

Shapes: B batch, S sequence, D width, T loops.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

from model import remat
from model.attention import Cache
from model.blocks import Block
from model.config import IceConfig
from model.expert_load import ExpertLoad
from model.halting import Halting
from model.injection import StableInjection
from model.moe import MoELayer
from model.norm import RMSNorm
from model.step_embedding import LoopStepEmbedding

RANDOM_STATE_STD = 0.02


class CoreOutput(NamedTuple):
    """What the loop hands to the coda. A NamedTuple of tensors: ZeRO-3's hooks rebuild it field by field."""

    h_BSD: torch.Tensor
    ponder_cost: torch.Tensor  # scalar fp32, 0 without ACT
    loop_residual: torch.Tensor  # scalar fp32, no gradient


class LoopedCore(nn.Module):
    """The recurrent blocks and everything that happens once per loop."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        self.config = config
        self.remat: remat.RematPolicy = "none"
        self.expert_load = ExpertLoad(config.recurrent_layers, config.n_experts)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.step_embedding = LoopStepEmbedding(config.dim)
        self.injection = StableInjection(config.dim)
        moe = config.n_experts > 0
        self.blocks = nn.ModuleList(
            Block(config, moe=moe, load_layer=layer) for layer in range(config.recurrent_layers)
        )
        for block in self.blocks:
            if isinstance(block.ffn, MoELayer):
                block.ffn.router.expert_load = self.expert_load
        self.halting = Halting(config) if config.act else None
        if config.initial_state == "learned":
            self.initial_state = nn.Parameter(torch.zeros(config.dim))

    def forward(
        self,
        e_BSD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        n_loops: int,
        grad_loops: int | None = None,
        sequence_loops_B: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> CoreOutput:
        """Run ``n_loops`` loops from the encoded input ``e``.

        Args:
            e_BSD: The normalised output of the prelude.
            cos: RoPE table of the tokens' positions, (S, rope_dim / 2) fp32; ``sin`` likewise.
            sin: See ``cos``.
            n_loops: T, at least 1.
            grad_loops: Loops at the end that keep a graph; None: all.
            sequence_loops_B: Depth of each sequence, int64; values above T mean T. None: T for all.
            cache: Keys and values of earlier tokens, a slot per block and loop.
        """
        decay, drive = self.injection()
        decay_D, drive_BSD = decay.to(e_BSD.dtype), drive.to(e_BSD.dtype) * e_BSD
        h_BSD = self._initial_state(e_BSD)
        inputs = (e_BSD, decay_D, drive_BSD, cos, sin)
        halting = None if self.halting is None else self.halting.start(h_BSD)
        first_with_graph = 0 if grad_loops is None else max(n_loops - grad_loops, 0)
        previous_BSD = h_BSD

        for loop in range(n_loops):
            with torch.no_grad() if loop < first_with_graph else nullcontext():
                self.expert_load.begin_loop(loop)
                new_BSD = remat.run(self.remat, self._step, h_BSD, *inputs, loop, cache, load=self.expert_load)
                last: torch.Tensor | bool = loop == n_loops - 1
                if sequence_loops_B is None:
                    previous_BSD, h_BSD = h_BSD, new_BSD
                else:
                    runs_B11 = (sequence_loops_B > loop).view(-1, 1, 1)
                    previous_BSD = torch.where(runs_B11, h_BSD, previous_BSD)
                    h_BSD = torch.where(runs_B11, new_BSD, h_BSD)
                    last = last | (sequence_loops_B == loop + 1).unsqueeze(-1)
                if self.halting is not None and halting is not None:
                    halting = self.halting(halting, h_BSD, loop, last)

        residual = _relative_change(h_BSD, previous_BSD)
        if halting is None:
            return CoreOutput(h_BSD, torch.zeros_like(residual), residual)
        return CoreOutput(halting.mixed_BSD.to(h_BSD.dtype), halting.depth_BS.mean(), residual)

    def _step(
        self,
        h_BSD: torch.Tensor,
        e_BSD: torch.Tensor,
        decay_D: torch.Tensor,
        drive_BSD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        loop: int,
        cache: Cache | None,
    ) -> torch.Tensor:
        stream_BSD = self.norm(h_BSD + e_BSD) + self.step_embedding(loop).to(h_BSD.dtype)
        next_BSD = torch.addcmul(drive_BSD, decay_D, h_BSD)
        for layer, block in enumerate(self.blocks):
            update_BSD = block(stream_BSD, cos, sin, None if cache is None else cache.slot("core", layer, loop))
            next_BSD = next_BSD + update_BSD
            if layer + 1 < len(self.blocks):
                stream_BSD = stream_BSD + update_BSD
        return next_BSD

    def _initial_state(self, e_BSD: torch.Tensor) -> torch.Tensor:
        match self.config.initial_state:
            case "input":
                return e_BSD
            case "learned":
                return self.initial_state.to(e_BSD.dtype).expand_as(e_BSD)
            case "random":
                # Drawn here, outside what is checkpointed. Zero, its mean, when not training: a decoded token must
                # see the state its full forward would.
                return RANDOM_STATE_STD * torch.randn_like(e_BSD) if self.training else torch.zeros_like(e_BSD)


@torch.no_grad()
def _relative_change(new_BSD: torch.Tensor, old_BSD: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ``||new - old|| / ||new||``, fp32."""
    new, old = new_BSD.detach().float(), old_BSD.detach().float()
    change: torch.Tensor = (new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-12)
    return change.mean()
