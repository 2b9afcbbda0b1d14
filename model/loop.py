r"""The looped core: T passes through the same blocks, inside ONE module's forward.

    u = norm(h_t + e) + step(t)
    h_(t+1) = A * h_t + B * e + F,    F = blocks(u) - u   (the blocks' update; their residual stream is not added again)

One forward for the whole loop is what lets ZeRO-3 treat the core as a leaf: its parameters are gathered once per
forward and once per backward, whatever T is.

A :class:`~model.depth.DepthPlan` says how deep. ``grad_loops = k`` runs the first T - k loops without a graph
(truncated backpropagation: the gradient of the last k loops with h_(T-k) as a constant). ``sequence_loops`` gives each
sequence its own depth: all run T loops, a sequence's state stops changing after its own.

Shapes: B batch, S sequence, D width, T loops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from model import remat
from model.attention import SequenceContext, Site
from model.blocks import Block, BlockCarry
from model.config import IceConfig
from model.depth import DepthPlan
from model.expert_load import ExpertLoad
from model.gradient_sum import summed_gradients
from model.grouped_product import expert_weights
from model.halting import Halting, HaltingState, closed
from model.initial_noise import normal_noise
from model.injection import StableInjection
from model.lora import GatedDepthLoRA
from model.moe import MoELayer
from model.norm import RMSNorm
from model.step_embedding import LoopStepEmbedding

RANDOM_STATE_STD = 0.02


class LoopInputs(NamedTuple):
    """What every loop of one forward is given, besides the state."""

    e_BSD: torch.Tensor
    decay_D: torch.Tensor
    drive_BSD: torch.Tensor
    context: SequenceContext


class LoopState(NamedTuple):
    """What one loop hands to the next."""

    h_BSD: torch.Tensor
    carries: tuple[BlockCarry, ...]
    halting: HaltingState | None
    change_BS: torch.Tensor  # fp32, no gradient: ||h_t - h_(t-1)|| / ||h_t|| in the last loop a token ran

    def output(self) -> torch.Tensor:
        """The state as the coda would read it now, (B, S, D)."""
        return self.h_BSD if self.halting is None else closed(self.halting, self.h_BSD)


States = dict[int, torch.Tensor]  # (B, S, D) by depth, those of the plan's ``read_loops``


class CoreOutput(NamedTuple):
    """What the loop hands to the coda. A NamedTuple of tensors: ZeRO-3's hooks rebuild it field by field."""

    h_BSD: torch.Tensor
    ponder_cost: torch.Tensor  # scalar fp32, 0 without ACT
    loop_residual: torch.Tensor  # scalar fp32, no gradient
    expert_share: torch.Tensor  # scalar fp32, no gradient: expert outputs computed rather than reused (AEC), 1 without
    states_NBSD: torch.Tensor | None = None  # the states at the plan's ``read_loops``


class LoopedCore(nn.Module):
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
        super().__init__()
        self.config, self.part = config, part
        self.set_remat("none")
        self.expert_load = expert_load or ExpertLoad(config.recurrent_layers, config.n_experts)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.step_embedding = LoopStepEmbedding(config.dim)
        self.injection = StableInjection(config.dim)
        moe = config.n_experts > 0
        self.blocks = nn.ModuleList(
            Block(config, moe=moe, load_layer=first_load_layer + layer, looped=True)
            for layer in range(config.recurrent_layers)
        )
        for block in self.blocks:
            if isinstance(block.ffn, MoELayer):
                block.ffn.router.expert_load = self.expert_load
        if config.lora_rank:
            self.adapters = nn.ModuleList(GatedDepthLoRA(config) for _ in range(config.recurrent_layers))
        self.halting = Halting(config) if config.act else None
        if config.initial_state == "learned":
            self.initial_state = nn.Parameter(torch.zeros(config.dim))

    def set_remat(self, policy: remat.RematPolicy, offload: bool = False) -> None:
        """Choose what the loops keep for the backward, and whether in host memory; see ``model/remat``."""
        self.remat, self.offload = policy, offload

    def forward(self, e_BSD: torch.Tensor, context: SequenceContext, plan: DepthPlan) -> CoreOutput:
        """Run ``plan.n_loops`` loops from the encoded input ``e``, the normalised output of the prelude."""
        decay, drive = self.injection()
        inputs = LoopInputs(e_BSD, decay.to(e_BSD.dtype), drive.to(e_BSD.dtype) * e_BSD, context)
        h_BSD = self._initial_state(e_BSD, plan.noise_keys_B)
        halting = None if self.halting is None else self.halting.start(h_BSD)
        unmoved_BS = h_BSD.new_zeros(h_BSD.shape[:2], dtype=torch.float32)
        state = LoopState(h_BSD, tuple(BlockCarry() for _ in self.blocks), halting, unmoved_BS)

        run = self._all_loops if plan.controller is None else self._controlled_loops
        with summed_gradients(expert_weights(self.blocks)):
            state, states = run(state, inputs, plan)

        residual = state.change_BS.mean()
        ponder_cost = torch.zeros_like(residual) if state.halting is None else state.halting.depth_BS.mean()
        read_NBSD = torch.stack([states[loop] for loop in plan.read_loops]) if plan.read_loops else None
        return CoreOutput(state.output(), ponder_cost, residual, self._expert_share(state.carries, residual), read_NBSD)

    def _all_loops(self, state: LoopState, inputs: LoopInputs, plan: DepthPlan) -> tuple[LoopState, States]:
        """All of the plan's loops: the first without a graph, the others under the policy of ``set_remat``."""
        first_with_graph = 0 if plan.grad_loops is None else max(plan.n_loops - plan.grad_loops, 0)
        with torch.no_grad():
            state, states = self._loops(state, inputs, plan, range(first_with_graph))
        host = remat.HostCopies(inputs[:3]) if self.offload else None
        nested = self.remat == "sqrt" and torch.is_grad_enabled()
        *outer, last = remat.segments(range(first_with_graph, plan.n_loops), nested)
        for segment in outer:
            state, read = remat.checkpointed(
                self._loops, state, inputs, plan, segment, load=self.expert_load, host=host
            )
            states |= read
        state, read = self._loops(state, inputs, plan, last, host)
        return state, states | read

    def _loops(
        self,
        state: LoopState,
        inputs: LoopInputs,
        plan: DepthPlan,
        loops: range,
        host: remat.HostCopies | None = None,
    ) -> tuple[LoopState, States]:
        """A run of loops, and the states wanted on the way."""
        states = {}
        for loop in loops:
            state = self._loop(state, inputs, plan, loop, host=host)
            if loop + 1 in plan.read_loops:
                states[loop + 1] = state.output()
        return state, states

    def _loop(
        self,
        state: LoopState,
        inputs: LoopInputs,
        plan: DepthPlan,
        loop: int,
        running_BS1: torch.Tensor | None = None,
        host: remat.HostCopies | None = None,
    ) -> LoopState:
        """One loop; where ``running_BS1`` is given and false, the state stays what it was."""
        self.expert_load.begin_loop(loop)
        old_BSD = state.h_BSD
        arguments = (old_BSD, state.carries, *inputs, loop)
        if self.remat == "none":
            new_BSD, carries = self._step(*arguments)
        else:
            kinds = remat.KINDS[self.remat]
            new_BSD, carries = remat.checkpointed(self._step, *arguments, kinds=kinds, load=self.expert_load, host=host)
            carries = remat.compact(carries)
        last: torch.Tensor | bool = loop == plan.n_loops - 1
        if plan.sequence_loops_B is not None:
            running_BS1 = (plan.sequence_loops_B > loop).view(-1, 1, 1)
            last = last | (plan.sequence_loops_B == loop + 1).unsqueeze(-1)
        h_BSD, change_BS = new_BSD, state.change_BS
        if running_BS1 is not None:
            h_BSD = torch.where(running_BS1, new_BSD, old_BSD)
            change_BS = torch.where(running_BS1.squeeze(-1), _relative_change(new_BSD, old_BSD), change_BS)
        elif loop == plan.n_loops - 1 or plan.controller is not None:
            change_BS = _relative_change(new_BSD, old_BSD)
        halting = state.halting
        if self.halting is not None and halting is not None:
            halting = self.halting(halting, h_BSD, loop, last)
        return LoopState(h_BSD, carries, halting, change_BS)

    def _controlled_loops(self, state: LoopState, inputs: LoopInputs, plan: DepthPlan) -> tuple[LoopState, States]:
        """Loops while the plan's controller lets a token go on; only while decoding, without gradients."""
        controller, context = plan.controller, inputs.context
        assert controller is not None
        controller.start(inputs.e_BSD, plan.n_loops)
        running_BS1: torch.Tensor | None = None
        states: States = {}
        for loop in range(plan.n_loops):
            if loop > 0:
                continues_BS1 = controller.continues(loop, state.output()).unsqueeze(-1)
                running_BS1 = continues_BS1 if running_BS1 is None else running_BS1 & continues_BS1
                if not bool(running_BS1.any()):
                    self._remember_skipped(context, loop, plan.n_loops)
                    break
            several = running_BS1 is not None and running_BS1.numel() > 1
            held = self._rows_before(context, loop) if several else []
            state = self._loop(state, inputs, plan, loop, running_BS1)
            if running_BS1 is not None:
                self._hold_ended(context, loop, running_BS1, held)
            if loop + 1 in plan.read_loops:
                states[loop + 1] = state.output()
        return state, states

    def _step(
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

    def _site(self, context: SequenceContext, layer: int, loop: int) -> Site:
        return context.site(self.part, layer, loop, self.config.window(loop * len(self.blocks) + layer))

    def _remember_skipped(self, context: SequenceContext, first: int, n_loops: int) -> None:
        """Give later tokens something to see in the loops that were not run: the keys of the last one that was."""
        if context.cache is None:
            return
        for loop in range(first, min(n_loops, context.cache.loop_slots or n_loops)):
            for layer, rows in enumerate(self._rows_before(context, loop)):
                slot = self._site(context, layer, loop).slot
                assert slot is not None
                slot.append(*rows)

    def _rows_before(self, context: SequenceContext, loop: int) -> list[tuple[torch.Tensor, ...]]:
        """What each layer remembers this forward's tokens by should they end before ``loop``, copied.

        That is the row of the loop before; or, where loops share slots and this one's holds an earlier loop, that row.
        """
        if context.cache is None:
            return []
        slots, length = context.cache.loop_slots, context.rope.cos.shape[1]
        before = loop if slots is not None and loop >= slots else loop - 1
        rows = []
        for layer in range(len(self.blocks)):
            slot = self._site(context, layer, before).slot
            assert slot is not None
            rows.append(tuple(tensor.clone() for tensor in slot.newest(length)))
        return rows

    def _hold_ended(
        self,
        context: SequenceContext,
        loop: int,
        running_BS1: torch.Tensor,
        held: list[tuple[torch.Tensor, ...]],
    ) -> None:
        """Put back the rows of tokens that had ended: a batch remembers a sequence as the sequence alone would."""
        running_B1S1 = running_BS1.unsqueeze(1)
        for layer, old_rows in enumerate(held):
            slot = self._site(context, layer, loop).slot
            assert slot is not None
            new_rows = slot.newest(running_BS1.shape[1])
            slot.append(*(torch.where(running_B1S1, n, o) for n, o in zip(new_rows, old_rows, strict=True)))

    def _expert_share(self, carries: tuple[BlockCarry, ...], like: torch.Tensor) -> torch.Tensor:
        shares = [
            block.expert_cache.computed_share(carry.experts)
            for block, carry in zip(self.blocks, carries, strict=True)
            if isinstance(block, Block) and block.expert_cache is not None
        ]
        return torch.stack(shares).mean() if shares else torch.ones_like(like)

    def _initial_state(self, e_BSD: torch.Tensor, noise_keys_B: torch.Tensor | None) -> torch.Tensor:
        match self.config.initial_state:
            case "input":
                return e_BSD
            case "learned":
                return self.initial_state.to(e_BSD.dtype).expand_as(e_BSD)
            case "random":
                # Drawn here, outside what is checkpointed. Zero, its mean, when not training: a decoded token must
                # see the state its full forward would.
                if not self.training:
                    return torch.zeros_like(e_BSD)
                if noise_keys_B is None:
                    return RANDOM_STATE_STD * torch.randn_like(e_BSD)
                return RANDOM_STATE_STD * normal_noise(noise_keys_B, *e_BSD.shape[1:]).to(e_BSD.dtype)


@torch.no_grad()
def _relative_change(new_BSD: torch.Tensor, old_BSD: torch.Tensor) -> torch.Tensor:
    """``||new - old|| / ||new||`` of each token, (B, S) fp32."""
    new, old = new_BSD.detach().float(), old_BSD.detach().float()
    change_BS: torch.Tensor = (new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-12)
    return change_BS
