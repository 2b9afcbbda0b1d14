r"""Mixture-of-Experts feed-forward: dropless token-choice routing with grouped matrix products.

    s = sigmoid(W_r x)  (or softmax), fp32                  scores of E experts
    chosen = top-K of (s + b), among the best groups        b: selection bias, moves the choice, never the gate
    g_i = scale * s_i / (sum_chosen s + 1e-20)              gates
    y = sum_chosen g_i FFN_i(x) + FFN_shared(x)

Routing follows DeepSeek-V3 (2024, section 2.1.2; groups scored by the sum of their two best experts) and equals
DeepSpeed's ``TokenChoiceTopKRouter``, because AutoEP replaces this whole module, in place, by its own layer with the
same semantics; hence the children's names and shapes: ``router.weight`` (E, D), ``experts.gate_up_proj`` (E, 2F, D)
with the gate's rows first, ``experts.down_proj`` (E, D, F), ``shared_experts``.

Tokens are sorted by expert and each projection of all experts is ONE grouped product; every token is processed
(nothing is dropped or padded to a capacity). Both moves are permutations, and their gradients are gathers: the same
result every time, which recomputation needs.

Shapes: N tokens (B * S), D width, E experts, K experts per token, F expert width, R rows sorted by expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from model import remat
from model.config import IceConfig
from model.expert_load import ExpertLoad
from model.grouped_product import GroupedProduct, grouped_mm
from model.init import ExpertDraws, expert_device, matrix_std
from model.swiglu import SwiGLU, swiglu


class Routes(NamedTuple):
    """A router's decision."""

    gates_NK: torch.Tensor  # fp32
    experts_NK: torch.Tensor  # int64
    tokens_per_expert_E: torch.Tensor  # int64


class Choice(NamedTuple):
    """Its part without a gradient: what a recomputation may be told (``model/remat``)."""

    experts_NK: torch.Tensor  # int64
    tokens_per_expert_E: torch.Tensor  # int64


def route(config: IceConfig, weight_ED: torch.Tensor, bias_E: torch.Tensor, x_ND: torch.Tensor) -> Routes:
    """Route N tokens with a router's weight and selection bias. All arithmetic in fp32, whatever the dtypes."""
    scores_NE = expert_scores(config, weight_ED, x_ND)
    choice = remat.keep("routes", lambda: _choice(config, scores_NE, bias_E))
    gates_NK = scores_NE.gather(1, choice.experts_NK)
    if config.route_norm:
        gates_NK = gates_NK / (gates_NK.sum(dim=-1, keepdim=True) + 1e-20)
    return Routes(gates_NK * config.route_scale, *choice)


def expert_scores(config: IceConfig, weight_ED: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
    """Scores of every expert for every token, (N, E) fp32."""
    logits_NE = F.linear(x_ND.float(), weight_ED.float())
    return logits_NE.sigmoid() if config.score_func == "sigmoid" else logits_NE.softmax(dim=-1)


def select_experts(config: IceConfig, scores_NE: torch.Tensor, bias_E: torch.Tensor) -> torch.Tensor:
    """Each token's K experts (N, K), int64 in no particular order; a pure function, so that others can ask too."""
    choice_NE = scores_NE.detach() + bias_E.float()
    if config.moe_n_groups > 1:
        choice_NE = _keep_best_groups(config, choice_NE)
    return choice_NE.topk(config.n_experts_per_tok, dim=-1, sorted=False).indices


def _choice(config: IceConfig, scores_NE: torch.Tensor, bias_E: torch.Tensor) -> Choice:
    experts_NK = select_experts(config, scores_NE, bias_E)
    chosen = experts_NK.reshape(-1)
    tokens_per_expert_E = torch.zeros(config.n_experts, dtype=torch.int64, device=chosen.device)
    return Choice(experts_NK, tokens_per_expert_E.scatter_add_(0, chosen, torch.ones_like(chosen)))


def _keep_best_groups(config: IceConfig, choice_NE: torch.Tensor) -> torch.Tensor:
    groups = choice_NE.unflatten(1, (config.moe_n_groups, -1))
    group_scores = groups.topk(2, dim=-1).values.sum(dim=-1)
    best = group_scores.topk(config.moe_topk_groups, dim=-1, sorted=False).indices
    excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    kept: torch.Tensor = groups.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
    return kept


class Router(nn.Module):
    """Chooses K of E experts for each token."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: IceConfig, load_layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.expert_load: ExpertLoad | None = None
        self.load_layer = load_layer
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.dim))
        # Moved by the balancer between optimizer steps, never by a gradient; saved with the model.
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_experts, dtype=torch.float32))
        nn.init.normal_(self.weight, std=matrix_std(config.dim))

    def forward(self, x_ND: torch.Tensor) -> Routes:
        """Route (N, D)."""
        routes = route(self.config, self.weight, self.e_score_correction_bias, x_ND)
        if self.training and self.expert_load is not None:
            self.expert_load.add(self.load_layer, routes.tokens_per_expert_E)
        return routes


class DispatchPlan(NamedTuple):
    """Where each (token, choice) goes when rows are sorted by expert."""

    token_of_row_R: torch.Tensor  # which token fills a row; an unused row names token 0 and is never read
    row_of_choice_NK: torch.Tensor  # which row holds a token's k-th choice
    offsets_E: torch.Tensor  # int32, end of each expert's rows


def plan_dispatch(routes: Routes | Choice, row_alignment: int = 1) -> DispatchPlan:
    """Sort choices by expert, each expert's rows starting at a multiple of ``row_alignment``.

    The number of rows depends on shapes only (no host synchronisation): ``N * K``, plus at most
    ``row_alignment - 1`` for each expert that can have a token when aligned; none without tokens.
    """
    n_choices, top_k = routes.experts_NK.numel(), routes.experts_NK.shape[1]
    counts_E = routes.tokens_per_expert_E
    order = routes.experts_NK.reshape(-1).argsort(stable=True)
    rows = torch.arange(n_choices, device=order.device)
    if row_alignment == 1:
        offsets_E = counts_E.cumsum(0)
        token_of_row_R = order // top_k
    else:
        padded_E = (counts_E + row_alignment - 1) // row_alignment * row_alignment
        offsets_E = padded_E.cumsum(0)
        shift_E = (offsets_E - padded_E) - (counts_E.cumsum(0) - counts_E)
        rows = rows + shift_E[routes.experts_NK.reshape(-1)[order]]
        n_rows = n_choices + min(counts_E.numel(), n_choices) * (row_alignment - 1)
        n_rows = (n_rows + row_alignment - 1) // row_alignment * row_alignment
        token_of_row_R = order.new_zeros(n_rows).scatter_(0, rows, order // top_k)
    row_of_choice = torch.empty_like(order).scatter_(0, order, rows)
    return DispatchPlan(token_of_row_R, row_of_choice.view(-1, top_k), offsets_E.to(torch.int32))


def _gathered_sum(rows_RD: torch.Tensor, row_of_choice_NK: torch.Tensor, gates_NK: torch.Tensor | None) -> torch.Tensor:
    """Each token's sum over its K rows, times their gates where given, (N, D), added up in fp32."""
    if rows_RD.is_cpu and rows_RD.dtype == torch.float32:
        # One pass that writes (N, D) alone: gathering first writes K times that, and reads it again.
        return F.embedding_bag(row_of_choice_NK, rows_RD, per_sample_weights=gates_NK, mode="sum")
    choices_NKD = rows_RD[row_of_choice_NK]
    if gates_NK is not None:
        choices_NKD = choices_NKD * gates_NK.unsqueeze(-1)
    return choices_NKD.sum(dim=1).to(rows_RD.dtype)


class _Dispatch(torch.autograd.Function):
    """Tokens to rows, (N, D) to (R, D). The gradient gathers each token's K rows instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, token_of_row_R: torch.Tensor, row_of_choice_NK: torch.Tensor) -> Any:
        ctx.save_for_backward(row_of_choice_NK)
        return x_ND.index_select(0, token_of_row_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (row_of_choice_NK,) = ctx.saved_tensors
        return _gathered_sum(grads[0].contiguous(), row_of_choice_NK, None), None, None


class _Collect(torch.autograd.Function):
    """Rows to the choices they were made for, (R, D) to (N, D), where each token has one."""

    @staticmethod
    def forward(ctx: Any, rows_RD: torch.Tensor, row_of_choice_NK: torch.Tensor) -> Any:
        ctx.save_for_backward(row_of_choice_NK)
        ctx.n_rows = rows_RD.shape[0]
        return rows_RD.index_select(0, row_of_choice_NK.reshape(-1))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (row_of_choice_NK,) = ctx.saved_tensors
        grad = grads[0]
        unread = ctx.n_rows > row_of_choice_NK.numel()  # rows that padding put there
        new = grad.new_zeros if unread else grad.new_empty
        grad_RD = new(ctx.n_rows, grad.shape[-1])
        return grad_RD.index_copy_(0, row_of_choice_NK.reshape(-1), grad), None


class _Mix(torch.autograd.Function):
    """Rows to tokens, (R, D) to (N, D): each token's gated sum. Both gradients gather, and write (R, D) once."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: torch.Tensor,
        gates_NK: torch.Tensor,
        token_of_row_R: torch.Tensor,
        row_of_choice_NK: torch.Tensor,
    ) -> Any:
        ctx.save_for_backward(rows_RD, gates_NK, token_of_row_R, row_of_choice_NK)
        return _gathered_sum(rows_RD, row_of_choice_NK, gates_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        rows_RD, gates_NK, token_of_row_R, row_of_choice_NK = ctx.saved_tensors
        grad_of_row_RD = grads[0].index_select(0, token_of_row_R).to(gates_NK.dtype)
        grad_rows = grad_gates = None
        if ctx.needs_input_grad[1]:
            grad_gates = (rows_RD * grad_of_row_RD).sum(dim=-1)[row_of_choice_NK]
        if ctx.needs_input_grad[0]:
            # A row that padding put there has gate 0, so that nothing flows back.
            gate_of_row_R = gates_NK.new_zeros(token_of_row_R.shape[0])
            gate_of_row_R.index_copy_(0, row_of_choice_NK.reshape(-1), gates_NK.reshape(-1))
            grad_rows = grad_of_row_RD.mul_(gate_of_row_R.unsqueeze(-1)).to(rows_RD.dtype)
        return grad_rows, grad_gates, None, None


def dispatch(x_ND: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """Tokens to rows sorted by expert, (N, D) to (R, D)."""
    rows_RD: torch.Tensor = _Dispatch.apply(x_ND, plan.token_of_row_R, plan.row_of_choice_NK)
    return rows_RD


def collect(rows_RD: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    """Undo a dispatch of one choice a token, (R, D) to (N, D)."""
    rows_ND: torch.Tensor = _Collect.apply(rows_RD, plan.row_of_choice_NK)
    return rows_ND


def mix(rows_RD: torch.Tensor, plan: DispatchPlan, gates_NK: torch.Tensor) -> torch.Tensor:
    """Rows back to their tokens, (R, D) to (N, D): each token's gated sum, added up in fp32."""
    mixed_ND: torch.Tensor = _Mix.apply(rows_RD, gates_NK, plan.token_of_row_R, plan.row_of_choice_NK)
    return mixed_ND


class Experts(nn.Module):
    """E SwiGLU feed-forwards as two stacked matrices; ``FFN_i(x) = W_down,i (silu(W_gate,i x) * W_up,i x)``."""

    def __init__(self, config: IceConfig) -> None:
        super().__init__()
        experts, hidden, dim, device = config.n_experts, config.expert_dim, config.dim, expert_device()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, dim, device=device))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, hidden, device=device))
        self.draws = ExpertDraws.of_next_layer(config)
        if not self.down_proj.is_meta:
            gate, up = self.gate_up_proj.detach().chunk(2, dim=1)
            self.draws.fill(gate, up, self.down_proj.detach())
        self.product: GroupedProduct = grouped_mm

    def forward(self, rows_RD: torch.Tensor, offsets_E: torch.Tensor) -> torch.Tensor:
        """(R, D) sorted by expert to (R, D); expert i owns rows ``offsets[i - 1] : offsets[i]``."""
        hidden_RF = swiglu(self.product(rows_RD, self.gate_up_proj, offsets_E))
        return self.product(hidden_RF, self.down_proj, offsets_E)


def row_alignment(device: torch.device, dtype: torch.dtype) -> int:
    """Rows an expert's group must be a multiple of: the CUDA kernels load 16-byte vectors along the rows."""
    return 1 if device.type == "cpu" else 16 // dtype.itemsize


class MoELayer(nn.Module):
    """Routed experts plus ``n_shared_experts`` that see every token."""

    def __init__(self, config: IceConfig, load_layer: int = 0) -> None:
        super().__init__()
        self.router = Router(config, load_layer)
        self.experts = Experts(config)
        # Present only when it exists: AutoEP reads the attribute, not the config.
        if config.n_shared_experts:
            self.shared_experts = SwiGLU(config, config.n_shared_experts * config.expert_dim)
        self.has_shared_experts = config.n_shared_experts > 0

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """(B, S, D) to (B, S, D)."""
        output_BSD = self.routed(hidden_BSD.reshape(-1, hidden_BSD.shape[-1])).view_as(hidden_BSD)
        if self.has_shared_experts:
            output_BSD = output_BSD + self.shared_experts(hidden_BSD)
        return output_BSD

    def routed(self, x_ND: torch.Tensor) -> torch.Tensor:
        """What the routed experts alone add, (N, D) to (N, D); N may be 0."""
        routes = self.router(x_ND)
        alignment = max(row_alignment(x_ND.device, x_ND.dtype), self.experts.product.row_alignment)
        plan = remat.keep("routes", lambda: plan_dispatch(routes, alignment))
        rows_RD = self.experts(dispatch(x_ND, plan), plan.offsets_E)
        return mix(rows_RD, plan, routes.gates_NK)
