r"""Rows between ranks by DeepEP (deepseek-ai/DeepEP, version 2) instead of all-to-alls: ``parallel.comm_backend``.

    dispatch   each token to every rank that holds one of its experts, once, and there to one row an expert; its gates
               travel along. Gradient: the rows' gradients combined, and each gate's brought back.
    combine    the rows of a token, multiplied by their gates before, added up where it came from. Gradient: a dispatch.

The buffer, its sharing between layers and its end are DeepSpeed's (``deepspeed.module_inject.auto_ep_comm``), and so is
the choice of kernels' resources. Two things are ours, because the layer is looped:

- A recomputed loop repeats the dispatch on the layout (DeepEP's *handle*) of the loop's own first run, since rows may
  arrive in another order. DeepSpeed's layer keeps one layout and refuses to recompute while several forwards are alive,
  which T loops are; here the layout is on the loop's tape (``model/remat``), under every policy.
- DeepEP's deterministic mode is switched on: rows of an expert are sorted by where they came from, so that the same
  seed gives the same bits.

Limits, from DeepEP: bf16 only; CUDA; NCCL 2.30.4 with GIN. A fresh dispatch waits for the number of rows on the host,
as the all-to-alls do. Unlike there, gates multiply rows before these travel back, rounded to bf16 once more.

Shapes: N tokens, K choices, D width, M rows received, L experts of this rank.
"""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import torch
from deepspeed.module_inject import auto_ep_comm
from torch import Tensor

from launch.settings import BadInputError
from model import remat
from model.moe import Choice, Routes

INSTALL = (
    "needs the package deep_ep, version 2 or newer, built from https://github.com/deepseek-ai/DeepEP on a machine with "
    "its GPUs, and NCCL 2.30.4 or newer with GIN"
)


def check_deepep(dtype: torch.dtype, device_type: str) -> None:
    """Raise ``BadInputError`` where ``parallel.comm_backend = "deepep"`` cannot work, before ranks wait for each other.

    What only the fabric can say (GIN, queue pairs) DeepEP says when the first buffer is built.
    """
    name = 'parallel.comm_backend = "deepep"'
    if dtype not in auto_ep_comm.SUPPORTED_DTYPES:
        raise BadInputError(f'{name}: dispatches bfloat16 only, and this run is {dtype}; use precision.dtype = "bf16"')
    if device_type not in _DEVICES:
        raise BadInputError(f'{name}: runs on CUDA only, and this is {device_type}; use "default"')
    if importlib.util.find_spec("deep_ep") is None:
        raise BadInputError(f'{name}: {INSTALL}; or use "default"')
    import deep_ep

    if not hasattr(deep_ep, "ElasticBuffer"):
        raise BadInputError(f'{name}: the installed deep_ep has no ElasticBuffer; {INSTALL}; or use "default"')


_DEVICES = ("cuda",)


def exchange_of(layer: Any, tokens: int) -> Any:
    """The layer's buffer; built when it is first asked for, at the same moment on every rank.

    Args:
        layer: An ``AutoEPMoELayer``; DeepSpeed frees the buffer with its engine.
        tokens: N, which must fit the buffer.
    """
    if layer._deepep_exchange is None:
        # DeepEP wants the group's communicator to exist.
        dist.barrier(group=layer.ep_group)
        with mock.patch.object(auto_ep_comm, "_import_deep_ep", _deterministic_deep_ep):
            layer._deepep_exchange = auto_ep_comm.shared_exchange(
                scope=layer.deepep_scope,
                ep_group=layer.ep_group,
                num_experts=layer.num_experts,
                top_k=layer.top_k,
                hidden_size=layer.hidden_size,
                num_max_tokens_per_rank=layer.comm_max_tokens_per_rank,
                num_sms=layer.comm_num_sm,
                qp_margin=layer.comm_qp_margin,
            )
    most = layer._deepep_exchange.num_max_tokens_per_rank
    if tokens > most:
        raise BadInputError(
            f"{tokens} tokens on a rank, {most} in DeepEP's buffer: a batch is larger than its settings"
        )
    return layer._deepep_exchange


_import_deep_ep = auto_ep_comm._import_deep_ep


def _deterministic_deep_ep() -> Any:
    """The package as DeepSpeed uses it, with buffers in deterministic mode."""
    deep_ep = _import_deep_ep()

    def buffer(*args: Any, **options: Any) -> Any:
        return deep_ep.ElasticBuffer(*args, **options, deterministic=True)

    return SimpleNamespace(ElasticBuffer=buffer, topk_idx_t=deep_ep.topk_idx_t)


def dispatch(exchange: Any, x_ND: Tensor, routes: Routes) -> tuple[Tensor, Tensor, Any]:
    """Tokens to the ranks of their experts: rows (M, D) sorted by local expert, their gates (M,) fp32, the layout."""
    layout: list[Any] = []
    rows_MD, gates_M = _Dispatch.apply(x_ND, routes.gates_NK, routes.experts_NK, exchange, layout)
    return rows_MD, gates_M, layout[0]


def combine(exchange: Any, rows_MD: Tensor, layout: Any) -> Tensor:
    """Each token's rows added up, (N, D)."""
    y_ND: Tensor = _Combine.apply(rows_MD, exchange, layout)
    return y_ND


def received(layout: Any, rows: int) -> Choice:
    """The rows that have arrived as a choice of local experts, one each."""
    ends_L = layout.psum_num_recv_tokens_per_expert.long()
    counts_L = ends_L.diff(prepend=ends_L.new_zeros(1))
    experts_L = torch.arange(len(counts_L), device=counts_L.device)
    return Choice(experts_L.repeat_interleave(counts_L, output_size=rows).unsqueeze(1), counts_L)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor, exchange: Any, layout: list[Any]) -> Any:
        fresh: list[tuple[Tensor, Tensor]] = []

        def arrive() -> Any:
            rows, gates, handle = exchange.dispatch(x_ND, experts_NK, gates_NK)
            fresh.append((rows, gates))
            return handle

        def arrive_again() -> tuple[Tensor, Tensor]:
            rows, gates = fresh.pop() if fresh else exchange.replay_dispatch(x_ND, experts_NK, gates_NK, handle)[:2]
            # DeepEP may give its whole buffer; what lies past the last row is undefined.
            return rows[: handle.num_expanded_tokens], gates[: handle.num_expanded_tokens].flatten()

        handle = remat.keep("layout", arrive)
        layout.append(handle)
        ctx.exchange, ctx.handle = exchange, handle
        ctx.token_shape, ctx.gate_shape = x_ND.shape, gates_NK.shape
        return remat.keep("dispatch", arrive_again)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_rows_MD, grad_gates_M = (grad.contiguous() for grad in grads)
        grad_x, grad_gates = ctx.exchange.combine_with_weight_grad(grad_rows_MD, ctx.handle, grad_gates_M)
        tokens = ctx.token_shape[0]
        return grad_x[:tokens], grad_gates[:tokens].view(ctx.gate_shape), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, exchange: Any, layout: Any) -> Any:
        ctx.exchange, ctx.handle, ctx.rows = exchange, layout, rows_MD.shape[0]
        return remat.keep("dispatch", lambda: exchange.combine(rows_MD.contiguous(), layout))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.exchange.dispatch_with_handle(grads[0].contiguous(), ctx.handle)[: ctx.rows], None, None
