"""The engine's MoE layer as a looped model wants it: planned by sorting, and with nothing done again that is known.

AutoEP puts an ``AutoEPMoELayer`` in the place of each of our MoE layers. It is right, and made for a layer that runs
once: a recomputation routes, asks the other ranks how many rows they send, and sends all rows, each again; on CPUs
it places rows in Python loops and pads each expert's group. Here its class is exchanged after ``deepspeed.initialize``
(parameters, hooks, groups and checkpoints stay), and with it how a forward goes:

    1. route              scores, top-k, gates: the router's matrix, ``model.moe.route``, fp32 whatever the dtype
    2. sort               (token, choice) rows by expert: those of a rank's experts lie together
    3. exchange counts    one small all-to-all: how many rows for each of my experts from each rank     EP > 1
    4. dispatch           all-to-all of rows                                                            EP > 1
    5. group              the received rows by local expert                                             EP > 1
    6. experts            grouped products
    7. combine            group undone, all-to-all back                                                 EP > 1
    8. mix                each token's gated sum, plus the shared experts

What 1 to 3 and 5 decide is kept under the ``routes`` policy of ``model/remat``, what 4 and 7 bring under ``dispatch``.
The collectives of a forward are the engine's own, as many and in the same order; a recomputation leaves out, on every
rank alike, those whose outcome was kept. All moves of rows are permutations whose gradients are gathers
(``row_moves.py``: torch's indexing, or on CUDA the engine's Triton kernels).

With ``parallel.fp8_dispatch`` the rows of 4 travel in eight bits (``model/fp8/wire.py``), and are kept so. What comes
back (7) and both gradients stay in the run's dtype: they are sums in the making, of K choices and of T loops.

The layer's ``tokens_per_expert`` buffer stays zero: nothing reads it but AutoEP's own balancing, which is off
(``model/expert_load.py`` counts by loop). With DeepEP as the transport it takes the place of 2 to 5, 7 and 8
(``deepep_transport.py``). With folded tensor parallelism the engine's own forward runs.

Shapes: N tokens, K choices a token, D width, R rows sent (N * K), M rows received, E experts, L experts of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import deepspeed.comm as dist
import torch
from deepspeed.module_inject.auto_ep_comm import COMM_BACKEND
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, SplitPlan, compute_split_plan
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from torch import Tensor, nn

from model import remat
from model.config import IceConfig
from model.expert_parallel import SELECTION_BIAS, routed_layers
from model.fp8 import pack_rows, unpack_rows
from model.grouped_product import GroupedProduct
from model.moe import Choice, DispatchPlan, Routes, plan_dispatch, route, row_alignment
from pretrain import deepep_transport
from pretrain.row_moves import RowMoves, torch_moves


class LoopedRouter(TokenChoiceTopKRouter):
    """The engine's router with the plain model's routing."""

    config: IceConfig

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> Routes:
        """Route (N, D); ``expert_bias`` is AutoEP's own balancing, which the engine's configuration leaves off."""
        return route(self.config, self.gate.weight, getattr(self, SELECTION_BIAS), x)


class ExchangePlan(NamedTuple):
    """Where rows go between ranks and back."""

    to_ranks: DispatchPlan  # tokens to rows sorted by expert, and so by rank
    splits: SplitPlan  # rows to and from each rank
    to_experts: DispatchPlan  # received rows, which lie by source rank, to rows sorted by local expert


class LoopedExpertLayer(AutoEPMoELayer):
    """See the module's docstring."""

    fp8_dispatch = False
    moves: RowMoves = torch_moves

    def _forward(self, hidden_states: Tensor) -> Any:
        if self.why_stock() is not None:
            return super()._forward(hidden_states)
        x_ND = hidden_states.reshape(-1, hidden_states.shape[-1])
        routes = self.router(x_ND, self.expert_bias)
        if self.ep_size == 1:
            output_ND = self._locally(x_ND, routes)
        elif self.comm_backend == COMM_BACKEND:
            output_ND = self._over_ranks(x_ND, routes)
        else:
            output_ND = self._by_deepep(x_ND, routes)
        return self._finalize_output(output_ND.view_as(hidden_states), x_ND, hidden_states, hidden_states.shape[-1])

    def why_stock(self) -> str | None:
        """Why the engine's own forward runs; None when ours does."""
        handles = self.folding_group_handles
        if handles is not None and handles.spec.tp_size > 1:
            return "experts are folded with tensor parallelism"
        return None

    def _alignment(self, x: Tensor) -> int:
        product: GroupedProduct = self.experts.product
        return max(row_alignment(x.device, x.dtype), product.row_alignment)

    def _run_experts(self, rows_RD: Tensor, plan: DispatchPlan) -> Tensor:
        ends_L = plan.offsets_E
        output_RD: Tensor = self.experts(rows_RD, ends_L.diff(prepend=ends_L.new_zeros(1)))
        return output_RD

    def _locally(self, x_ND: Tensor, routes: Routes) -> Tensor:
        """The gated sums, (N, D), where this rank holds all experts."""
        alignment = self._alignment(x_ND)
        plan = remat.keep("routes", lambda: plan_dispatch(routes, alignment))
        rows_RD = self._run_experts(self.moves.dispatch(x_ND, plan), plan)
        return self.moves.combine(rows_RD, plan, routes.gates_NK)

    def _over_ranks(self, x_ND: Tensor, routes: Routes) -> Tensor:
        """The gated sums, (N, D), where each rank holds L experts."""
        alignment = self._alignment(x_ND)
        plan = remat.keep("routes", lambda: self._plan_exchange(routes, alignment))
        sent, received = plan.splits.input_splits, plan.splits.output_splits
        exchange = _Fp8Exchange if self.fp8_dispatch else _Exchange
        rows_MD = exchange.apply(self.moves.dispatch(x_ND, plan.to_ranks), self.ep_group, sent, received)
        output_RD = self._run_experts(self.moves.dispatch(rows_MD, plan.to_experts), plan.to_experts)
        rows_MD = self.moves.collect(output_RD, plan.to_experts)
        rows_RD = _Exchange.apply(rows_MD, self.ep_group, received, sent)
        return self.moves.combine(rows_RD, plan.to_ranks, routes.gates_NK)

    def _by_deepep(self, x_ND: Tensor, routes: Routes) -> Tensor:
        """The gated sums, (N, D), where DeepEP moves rows between ranks."""
        exchange = deepep_transport.exchange_of(self, x_ND.shape[0])
        rows_MD, gates_M, layout = deepep_transport.dispatch(exchange, x_ND, routes)
        alignment = self._alignment(x_ND)
        plan = remat.keep(
            "routes", lambda: plan_dispatch(deepep_transport.received(layout, rows_MD.shape[0]), alignment)
        )
        output_RD = self._run_experts(self.moves.dispatch(rows_MD, plan), plan)
        rows_MD = self.moves.combine(output_RD, plan, gates_M.unsqueeze(1))
        return deepep_transport.combine(exchange, rows_MD, layout)

    def _plan_exchange(self, routes: Routes, alignment: int) -> ExchangePlan:
        splits = compute_split_plan(
            selected_experts=routes.experts_NK,
            num_experts=self.num_experts,
            ep_size=self.ep_size,
            num_local_experts=self.num_local_experts,
            ep_group=self.ep_group,
            num_tokens_per_expert=routes.tokens_per_expert_E.int(),
        )
        counts_SL = splits.local_counts_by_source.long()
        experts_SL = torch.arange(self.num_local_experts, device=counts_SL.device).expand_as(counts_SL)
        expert_of_row_M = experts_SL.flatten().repeat_interleave(
            counts_SL.flatten(), output_size=sum(splits.output_splits)
        )
        received = Choice(expert_of_row_M.unsqueeze(1), counts_SL.sum(0))
        return ExchangePlan(plan_dispatch(routes), splits, plan_dispatch(received, alignment))


class _Exchange(torch.autograd.Function):
    """All-to-all of rows, (R, D) to (M, D); the gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, group: Any, sent: list[int], received: list[int]) -> Any:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return remat.keep("dispatch", lambda: _all_to_all(rows_RD, group, sent, received))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_to_all(grads[0], ctx.group, ctx.received, ctx.sent), None, None, None


class _Fp8Exchange(_Exchange):
    """The same with rows packed in eight bits on the way there; the gradient passes as if they had not been."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, group: Any, sent: list[int], received: list[int]) -> Any:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        packed = remat.keep("dispatch", lambda: _all_to_all(pack_rows(rows_RD), group, sent, received))
        return unpack_rows(packed, rows_RD.shape[1], rows_RD.dtype)


def _all_to_all(rows_RD: Tensor, group: Any, sent: list[int], received: list[int]) -> Tensor:
    output_MD = rows_RD.new_empty(sum(received), rows_RD.shape[1])
    dist.all_to_all_single(
        output_MD, rows_RD.contiguous(), output_split_sizes=received, input_split_sizes=sent, group=group
    )
    return output_MD


def adopt_expert_layers(
    model: nn.Module, config: IceConfig, moves: RowMoves = torch_moves, fp8_dispatch: bool = False
) -> str | None:
    """After ``deepspeed.initialize``: give every replaced layer and its router our class.

    Args:
        model: The engine's.
        config: Its architecture.
        moves: Who moves rows between tokens and experts on a rank (``row_moves.py``).
        fp8_dispatch: Rows travel to their experts in eight bits.

    Returns:
        Why the engine's own forward runs all the same, to be said once; None when ours does.
    """
    reason = None
    for layer in routed_layers(model):
        if isinstance(layer.module, AutoEPMoELayer):
            layer.module.__class__ = LoopedExpertLayer
            layer.module.moves, layer.module.fp8_dispatch = moves, fp8_dispatch
            layer.router.__class__ = LoopedRouter
            layer.router.config = config
            reason = layer.module.why_stock()
    return reason
