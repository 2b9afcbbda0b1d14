r"""What a looped core is: T passes of one step over the same weights, inside ONE module's forward.

    h_(t+1), carries_(t+1) = step(h_t, carries_t, inputs, t)        inputs: e, and what is made of it once a forward

:class:`LoopedCore` runs the loop; a family of architectures is a subclass that says what a step is (``ice_core.py``,
``plain_core.py``, ``refine_core.py``, ``apex_core.py``; ``cores.py`` chooses). A subclass must define

    inputs(e, context)          what every loop is given besides the state
    first_carries(h)            what a loop hands to the next besides the state, before the first
    _step(h, carries, *inputs, loop)

and may define, each with a default that does nothing,

    loop_output(carries)        what one loop says for itself, collected over loops (per-loop outputs)
    held(running, new, old)     what of the carries stays as it was where a token has ended
    settled(carries)            whether further loops would change nothing, so that they need not run
    output(state)               the state as the coda reads it
    shown(state)                what a depth controller is asked about
    measured(state)             numbers of the whole loop, for the output

One forward for the whole loop is what lets ZeRO-3 treat the core as a leaf: its parameters are gathered once per
forward and once per backward, whatever T is. No step may depend on anything but its arguments: it is run again in the
backward. Loops end early only where no rank waits for them: never in training, and never with experts.

A :class:`~model.depth.DepthPlan` says how deep. ``grad_loops = k`` runs the first T - k loops without a graph
(truncated backpropagation: the gradient of the last k loops with h_(T-k) as a constant). ``sequence_loops`` gives each
sequence its own depth: all run T loops, a sequence's state stops changing after its own.

Shapes: B batch, S sequence, D width, T loops.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from model import remat
from model.attention import SequenceContext, Site
from model.blocks import Block
from model.config import IceConfig
from model.depth import DepthPlan
from model.expert_load import ExpertLoad
from model.gradient_sum import summed_gradients
from model.grouped_product import expert_weights
from model.halting import Halting, HaltingState, closed
from model.initial_noise import normal_noise
from model.moe import MoELayer
from model.verifier import RefinementTrace

RANDOM_STATE_STD = 0.02


class LoopInputs(NamedTuple):
    """The least that every loop of one forward is given, besides the state; a core may want more, with these names."""

    e_BSD: torch.Tensor
    context: SequenceContext


class LoopState(NamedTuple):
    """What one loop hands to the next."""

    h_BSD: torch.Tensor
    carries: Any  # nested tuples of tensors, as the core's steps hand them on
    halting: HaltingState | None
    change_BS: torch.Tensor  # fp32, no gradient: ||h_t - h_(t-1)|| / ||h_t|| in the last loop a token ran
    outputs: tuple[Any, ...] = ()  # what each loop said for itself; empty where the core's loops say nothing


States = dict[int, torch.Tensor]  # (B, S, D) by depth, those of the plan's ``read_loops``


class CoreOutput(NamedTuple):
    """What the loop hands to the coda. A NamedTuple of tensors: ZeRO-3's hooks rebuild it field by field."""

    h_BSD: torch.Tensor
    ponder_cost: torch.Tensor  # scalar fp32, 0 without ACT
    loop_residual: torch.Tensor  # scalar fp32, no gradient
    expert_share: torch.Tensor  # scalar fp32, no gradient: expert outputs computed rather than reused (AEC), 1 without
    states_NBSD: torch.Tensor | None = None  # the states at the plan's ``read_loops``
    loops_used_BS: torch.Tensor | None = None  # int64, loops until a token's state had settled; None: nobody looked
    refinement: RefinementTrace | None = None  # what the steps of an Apex core say for themselves


class LoopedCore(nn.Module):
    """The loop of every family; see the module's docstring for what a subclass defines.

    Args:
        config: The model.
        part: The core's name in the decoding cache.
        expert_load: Where the routers count; None: a counter of its own.
    """

    blocks: nn.ModuleList
    initial_state: nn.Parameter  # (D,), with ``initial_state = "learned"``

    def __init__(self, config: IceConfig, part: str = "core", expert_load: ExpertLoad | None = None) -> None:
        super().__init__()
        self.config, self.part = config, part
        self.set_remat("none")
        self.expert_load = expert_load or ExpertLoad(config.recurrent_layers, config.n_experts)
        self.halting: Halting | None = None

    def make_blocks(self, first_load_layer: int = 0) -> nn.ModuleList:
        """The recurrent blocks, their routers counting in ``expert_load`` from layer ``first_load_layer`` on."""
        config = self.config
        blocks = [
            Block(config, moe=config.n_experts > 0, load_layer=first_load_layer + layer, looped=True)
            for layer in range(config.recurrent_layers)
        ]
        self.count_experts(blocks)
        return nn.ModuleList(blocks)

    def count_experts(self, blocks: Iterable[Any]) -> None:
        """Let the routers of ``blocks`` (anything with an ``ffn``) count in this core's ``expert_load``."""
        for block in blocks:
            if isinstance(block.ffn, MoELayer):
                block.ffn.router.expert_load = self.expert_load

    def inputs(self, e_BSD: torch.Tensor, context: SequenceContext) -> Any:
        """What every loop is given besides the state: a NamedTuple with at least the fields of ``LoopInputs``."""
        return LoopInputs(e_BSD, context)

    def first_carries(self, h_BSD: torch.Tensor) -> Any:
        """What the first step gets from the loop before it."""
        raise NotImplementedError

    def _step(self, h_BSD: torch.Tensor, carries: Any, *inputs_and_loop: Any) -> tuple[torch.Tensor, Any]:
        """One loop: the next state (B, S, D) and carries, from ``(h, carries, *inputs, loop)``."""
        raise NotImplementedError

    def loop_output(self, carries: Any) -> Any:
        """What the loop that left ``carries`` says for itself; None: nothing."""
        return None

    def held(self, running_BS1: torch.Tensor, new: Any, old: Any) -> Any:
        """The carries to go on with where ``running_BS1`` is false for tokens that have ended."""
        return new

    def settled(self, carries: Any) -> bool:
        """Whether more loops would leave every token as it is."""
        return False

    def moving(self, carries: Any) -> Any:
        """``carries`` with every token still running: what measures of the loop's dynamics want."""
        return carries

    def output(self, state: LoopState) -> torch.Tensor:
        """The state as the coda would read it now, (B, S, D)."""
        return state.h_BSD if state.halting is None else closed(state.halting, state.h_BSD)

    def shown(self, state: LoopState) -> torch.Tensor:
        """What a depth controller is asked about; (B, S, ...)."""
        return self.output(state)

    def measured(self, state: LoopState) -> dict[str, Any]:
        """More fields of the :class:`CoreOutput`."""
        return {}

    def set_remat(self, policy: remat.RematPolicy, offload: bool = False) -> None:
        """Choose what the loops keep for the backward, and whether in host memory; see ``model/remat``."""
        self.remat, self.offload = policy, offload

    def forward(self, e_BSD: torch.Tensor, context: SequenceContext, plan: DepthPlan) -> CoreOutput:
        """Run ``plan.n_loops`` loops from the encoded input ``e``, the normalised output of the prelude."""
        inputs = self.inputs(e_BSD, context)
        h_BSD = self._initial_state(e_BSD, plan.noise_keys_B)
        halting = None if self.halting is None else self.halting.start(h_BSD)
        unmoved_BS = h_BSD.new_zeros(h_BSD.shape[:2], dtype=torch.float32)
        state = LoopState(h_BSD, self.first_carries(h_BSD), halting, unmoved_BS)

        run = self._all_loops if plan.controller is None else self._controlled_loops
        with summed_gradients(expert_weights(self.blocks)):
            state, states = run(state, inputs, plan)

        residual = state.change_BS.mean()
        ponder_cost = torch.zeros_like(residual) if state.halting is None else state.halting.depth_BS.mean()
        read_NBSD = torch.stack([states[loop] for loop in plan.read_loops]) if plan.read_loops else None
        measured = {"expert_share": torch.ones_like(residual), **self.measured(state)}
        return CoreOutput(self.output(state), ponder_cost, residual, states_NBSD=read_NBSD, **measured)

    def _all_loops(self, state: LoopState, inputs: Any, plan: DepthPlan) -> tuple[LoopState, States]:
        """All of the plan's loops: the first without a graph, the others under the policy of ``set_remat``."""
        first_with_graph = 0 if plan.grad_loops is None else max(plan.n_loops - plan.grad_loops, 0)
        with torch.no_grad():
            state, states = self._loops(state, inputs, plan, range(first_with_graph))
        shared = [each for each in inputs if isinstance(each, torch.Tensor)]
        host = remat.HostCopies(shared) if self.offload else None
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
        inputs: Any,
        plan: DepthPlan,
        loops: range,
        host: remat.HostCopies | None = None,
    ) -> tuple[LoopState, States]:
        """A run of loops, and the states wanted on the way."""
        states = {}
        waited_for = self.training or torch.is_grad_enabled() or self.config.n_experts > 0
        may_end = not waited_for and inputs.context.cache is None and plan.sequence_loops_B is None
        ended = False
        for loop in loops:
            if not ended:
                state = self._loop(state, inputs, plan, loop, host=host)
                ended = may_end and self.settled(state.carries)
            if loop + 1 in plan.read_loops:
                states[loop + 1] = self.output(state)
        return state, states

    def _loop(
        self,
        state: LoopState,
        inputs: Any,
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
            carries = self.held(running_BS1, carries, state.carries)
            change_BS = torch.where(running_BS1.squeeze(-1), relative_change(new_BSD, old_BSD), change_BS)
        elif loop == plan.n_loops - 1 or plan.controller is not None:
            change_BS = relative_change(new_BSD, old_BSD)
        halting = state.halting
        if self.halting is not None and halting is not None:
            halting = self.halting(halting, h_BSD, loop, last)
        said = self.loop_output(carries)
        outputs = state.outputs if said is None else (*state.outputs, said)
        return LoopState(h_BSD, carries, halting, change_BS, outputs)

    def _controlled_loops(self, state: LoopState, inputs: Any, plan: DepthPlan) -> tuple[LoopState, States]:
        """Loops while the plan's controller lets a token go on; only while decoding, without gradients."""
        controller, context = plan.controller, inputs.context
        assert controller is not None
        controller.start(inputs.e_BSD, plan.n_loops)
        running_BS1: torch.Tensor | None = None
        states: States = {}
        for loop in range(plan.n_loops):
            if loop > 0:
                continues_BS1 = controller.continues(loop, self.shown(state)).unsqueeze(-1)
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
                states[loop + 1] = self.output(state)
        return state, states

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
def relative_change(new_BSD: torch.Tensor, old_BSD: torch.Tensor) -> torch.Tensor:
    """``||new - old|| / ||new||`` of each token, (B, S) fp32."""
    new, old = new_BSD.detach().float(), old_BSD.detach().float()
    change_BS: torch.Tensor = (new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-12)
    return change_BS
