r"""Apex's core: propose, review, refine, judge, remember; the same blocks again with what was remembered.

    u = norm(h_t + e) + step(t);   h_(t+1) = blocks(u; memory_t)              every block also attends to the memory
    p, r, f = W_p n, W_r n, W_f n,   n = norm(h_(t+1))                        proposal, review, refinement
    score = sigmoid(verifier(f))
    memory_(t+1), v_(t+1) = spiral(memory_t, p, r, f, score, v_t)             ``spiral_memory.py``
    read by the coda after T steps:  h_T + attention(norm(h_T), memory_T)

Self-attention is causal, grouped, in a sliding window, and every n-th layer sees all (``IceConfig.window``, counted
over the steps). The proposal, review and refinement of a step act on the rest of the model through the memory alone.

A token may be given fewer than T steps while decoding, by its score (``ScoreSchedule``). Steps run on every rank alike
in training.

After ``specification/apex.txt``. Where it is silent: the stream is normalised and e is added again in every step, as in
Ice's core, so that states are bounded at any number of steps.

Shapes: B batch, S sequence, D width, K slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from model.attention import Carry, SequenceContext, Site, build_attention
from model.config import IceConfig
from model.init import Linear
from model.loop import LoopedCore, LoopState
from model.moe import MoELayer
from model.norm import RMSNorm
from model.spiral_memory import MemoryAttention, SpiralMemory
from model.step_embedding import LoopStepEmbedding
from model.swiglu import SwiGLU
from model.verifier import CORRECT, GAIN, Verdict, Verifier, trace_of


class ApexCarry(NamedTuple):
    """What a step hands to the next besides the hidden state."""

    attention: tuple[Carry, ...]
    slots_BSKD: torch.Tensor
    invariant_BSD: torch.Tensor
    verdict: Verdict | None  # of the step that left it


class MemoryBlock(nn.Module):
    """Self-attention, attention to the memory, feed-forward; pre-norm. Returns its update, as every block here."""

    def __init__(self, config: IceConfig, load_layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, looped=True)
        self.memory_norm = RMSNorm(config.dim, config.norm_eps)
        self.memory_attention = MemoryAttention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn: nn.Module = MoELayer(config, load_layer) if config.n_experts else SwiGLU(config, config.ffn_dim)

    def forward(
        self, x_BSD: torch.Tensor, slots_BSKD: torch.Tensor, site: Site, carry: Carry
    ) -> tuple[torch.Tensor, Carry]:
        """The update to add to ``x``, (B, S, D), and what the attention gets back in the next step."""
        update_BSD, carry = self.attention(self.attention_norm(x_BSD), site, carry)
        update_BSD = update_BSD + self.memory_attention(self.memory_norm(x_BSD + update_BSD), slots_BSKD)
        return update_BSD + self.ffn(self.ffn_norm(x_BSD + update_BSD)), carry


class ApexCore(LoopedCore):
    """The shared blocks, the three heads, the verifier and the memory."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.norm = RMSNorm(dim, config.norm_eps)
        self.step_embedding = LoopStepEmbedding(dim)
        self.blocks = nn.ModuleList(MemoryBlock(config, layer) for layer in range(config.recurrent_layers))
        self.count_experts(self.blocks)
        self.head_norm = RMSNorm(dim, config.norm_eps)
        self.proposal_proj = Linear(dim, dim)
        self.review_proj = Linear(dim, dim)
        self.refinement_proj = Linear(dim, dim)
        self.verifier = Verifier(dim, config.norm_eps)
        self.memory = SpiralMemory(config)
        self.read_norm = RMSNorm(dim, config.norm_eps)
        self.memory_read = MemoryAttention(config)
        if config.initial_state == "learned":
            self.initial_state = nn.Parameter(torch.zeros(dim))

    def first_carries(self, h_BSD: torch.Tensor) -> ApexCarry:
        """The memory's first slots; the invariant begins at zero and is set to e by the first step."""
        return ApexCarry(tuple(() for _ in self.blocks), self.memory.start(h_BSD), torch.zeros_like(h_BSD), None)

    def _step(  # type: ignore[override]
        self, h_BSD: torch.Tensor, carries: ApexCarry, e_BSD: torch.Tensor, context: SequenceContext, loop: int
    ) -> tuple[torch.Tensor, ApexCarry]:
        stream_BSD = self.norm(h_BSD + e_BSD) + self.step_embedding(loop).to(h_BSD.dtype)
        attention = []
        for layer, (block, carry) in enumerate(zip(self.blocks, carries.attention, strict=True)):
            update_BSD, new = block(stream_BSD, carries.slots_BSKD, self._site(context, layer, loop), carry)
            stream_BSD = stream_BSD + update_BSD
            attention.append(new)
        normed_BSD = self.head_norm(stream_BSD)
        proposal, review, refinement = (
            head(normed_BSD) for head in (self.proposal_proj, self.review_proj, self.refinement_proj)
        )
        hoped_BS = self.verifier.hope(refinement)
        invariant_BSD = e_BSD if loop == 0 else carries.invariant_BSD
        slots, invariant = self.memory(
            carries.slots_BSKD, proposal, review, refinement, hoped_BS.sigmoid(), invariant_BSD
        )
        verdict = Verdict(self.verifier.judge(refinement), hoped_BS, _inconsistency(proposal, review, refinement))
        return stream_BSD, ApexCarry(tuple(attention), slots, invariant, verdict)

    def loop_output(self, carries: ApexCarry) -> Verdict | None:
        """The step's verdict."""
        return carries.verdict

    def held(self, running_BS1: torch.Tensor, new: ApexCarry, old: ApexCarry) -> ApexCarry:
        """The memory of a token that has ended stays what it was; so does what was said of it."""
        if old.verdict is None:
            return new
        running_BS = running_BS1.squeeze(-1)
        assert new.verdict is not None
        return new._replace(
            slots_BSKD=torch.where(running_BS1.unsqueeze(-1), new.slots_BSKD, old.slots_BSKD),
            invariant_BSD=torch.where(running_BS1, new.invariant_BSD, old.invariant_BSD),
            verdict=Verdict(
                torch.where(running_BS1, new.verdict.judged_BS2, old.verdict.judged_BS2),
                torch.where(running_BS, new.verdict.hoped_BS, old.verdict.hoped_BS),
                torch.where(running_BS, new.verdict.consistency_BS, old.verdict.consistency_BS),
            ),
        )

    def output(self, state: LoopState) -> torch.Tensor:
        """The hidden state and what it reads from the memory, (B, S, D)."""
        found_BSD: torch.Tensor = self.memory_read(self.read_norm(state.h_BSD), state.carries.slots_BSKD)
        return state.h_BSD + found_BSD

    def shown(self, state: LoopState) -> torch.Tensor:
        """The verifier's two probabilities, (B, S, 2): that the token is right, and that another step would help."""
        judged_BS2: torch.Tensor = state.carries.verdict.judged_BS2
        return judged_BS2.sigmoid()

    def measured(self, state: LoopState) -> dict[str, Any]:
        """The verdicts of all steps."""
        return {"refinement": trace_of(state.outputs)}


class ScoreSchedule:
    """Ends a token's steps once its score is high or another step promises nothing; a ``DepthController``.

    Args:
        threshold: Score from which a token has had enough.
        gain_threshold: Least probability of a benefit for which another step is run; 0 asks the score alone.

    Attributes:
        loops_BS: Steps that each token of the latest forward was given, int64.
        ended_B: Sequences whose output nobody reads any more: one step. None: none.
    """

    def __init__(self, threshold: float = 0.9, gain_threshold: float = 0.0) -> None:
        for name, value in (("threshold", threshold), ("gain_threshold", gain_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value}: must be between 0 and 1, a probability")
        self.threshold, self.gain_threshold = threshold, gain_threshold
        self.loops_BS = torch.empty(0, 0, dtype=torch.int64)
        self.ended_B: torch.Tensor | None = None

    def start(self, e_BSD: torch.Tensor, n_loops: int) -> None:
        """Every token is given one step."""
        self.loops_BS = torch.ones(e_BSD.shape[:2], dtype=torch.int64, device=e_BSD.device)

    def continues(self, loop: int, shown: torch.Tensor) -> torch.Tensor:
        """Whether step number ``loop`` is run, (B, S), by what ``ApexCore.shown`` gave after the one before."""
        open_BS = (shown[..., CORRECT] < self.threshold) & (shown[..., GAIN] >= self.gain_threshold)
        runs_BS = (self.loops_BS == loop) & open_BS
        if self.ended_B is not None:
            runs_BS = runs_BS & ~self.ended_B.unsqueeze(1)
        self.loops_BS = torch.where(runs_BS, loop + 1, self.loops_BS)
        return runs_BS


def _inconsistency(proposal: torch.Tensor, review: torch.Tensor, refinement: torch.Tensor) -> torch.Tensor:
    """``MSE(proposal, refinement) + MSE(review, refinement)`` of each token, (B, S) fp32."""
    refinement = refinement.float()
    return (proposal.float() - refinement).square().mean(-1) + (review.float() - refinement).square().mean(-1)
