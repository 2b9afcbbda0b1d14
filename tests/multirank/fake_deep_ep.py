"""A stand-in for the package ``deep_ep`` on CPUs: ``ElasticBuffer`` with DeepEP's contract, by all-to-alls over gloo.

As DeepEP does: rows of one expert arrive in an order that differs from dispatch to dispatch and lives in the handle; a
dispatch on a handle gives a buffer with more rows than arrived; combine adds in fp32 and takes no gates to multiply by.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

calls: Counter[str] = Counter()


class Handle:
    """Where rows go and how they lie; attributes are named as DeepEP's."""

    def __init__(self, topk_idx: Tensor, num_experts: int, group: Any, rotation: int) -> None:
        self.do_expand, self.topk_idx = True, topk_idx.clone()
        ranks = dist.get_world_size(group)
        self.order = topk_idx.flatten().argsort(stable=True)  # choices by expert, and so by rank
        sent_WL = torch.bincount(topk_idx.flatten(), minlength=num_experts).view(ranks, -1)
        received_WL = torch.empty_like(sent_WL)
        dist.all_to_all_single(received_WL, sent_WL, group=group)
        self.sent, self.received = sent_WL.sum(1).tolist(), received_WL.sum(1).tolist()
        counts_L = received_WL.sum(0)
        self.psum_num_recv_tokens_per_expert = counts_L.cumsum(0).int()
        self.num_expanded_tokens = int(counts_L.sum())
        experts_WL = torch.arange(len(counts_L)).expand_as(received_WL)
        by_expert = experts_WL.flatten().repeat_interleave(received_WL.flatten()).argsort(stable=True)
        runs = by_expert.split(counts_L.tolist())
        self.arrival = torch.cat([run.roll(rotation) for run in runs])


class ElasticBuffer:
    """The calls that DeepSpeed makes."""

    def __init__(self, group: Any, *, num_max_tokens_per_rank: int, deterministic: bool, **options: Any) -> None:
        assert deterministic, "the same seed must give the same bits"
        assert options["explicitly_destroy"]
        self.group, self.capacity = group, num_max_tokens_per_rank
        calls["built"] += 1

    def dispatch(
        self,
        x: Tensor,
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        expert_alignment: int = 1,
        handle: Handle | None = None,
        do_expand: bool = False,
        num_sms: int = 0,
    ) -> tuple[Tensor, None, Tensor | None, Handle, None]:
        assert do_expand
        assert expert_alignment == 1
        assert len(x) <= self.capacity
        fresh = handle is None
        calls["fresh" if fresh else "replayed" if topk_weights is not None else "backward of combine"] += 1
        if handle is None:
            assert topk_idx is not None
            assert num_experts is not None
            handle = Handle(topk_idx, num_experts, self.group, calls["fresh"])
        else:
            assert topk_idx is None, "DeepEP takes either"
        top_k = handle.topk_idx.shape[1]
        rows = self._there(x[handle.order // top_k], handle)
        weights = None if topk_weights is None else self._there(topk_weights.flatten()[handle.order], handle)
        if not fresh:
            rows = torch.cat((rows, rows.new_full((3, rows.shape[1]), torch.nan)))
            weights = None if weights is None else torch.cat((weights, weights.new_full((3,), torch.nan)))
        return rows, None, weights, handle, None

    def combine(
        self, x: Tensor, *, handle: Handle, topk_weights: Tensor | None = None, num_sms: int = 0
    ) -> tuple[Tensor, Tensor | None, None]:
        calls["combine" if topk_weights is None else "backward of dispatch"] += 1
        shape = handle.topk_idx.shape
        y = self._back(x, handle).view(*shape, -1).float().sum(1).to(x.dtype)
        weights = None if topk_weights is None else self._back(topk_weights, handle).view(shape)
        return y, weights, None

    def destroy(self) -> None:
        calls["destroyed"] += 1

    def _there(self, sent: Tensor, handle: Handle) -> Tensor:
        received = sent.new_empty(sum(handle.received), *sent.shape[1:])
        dist.all_to_all_single(received, sent.contiguous(), handle.received, handle.sent, group=self.group)
        return received[handle.arrival]

    def _back(self, rows: Tensor, handle: Handle) -> Tensor:
        assert len(rows) == handle.num_expanded_tokens, "combine reads the rows that arrived"
        unsorted = torch.empty_like(rows)
        unsorted[handle.arrival] = rows
        returned = rows.new_empty(sum(handle.sent), *rows.shape[1:])
        dist.all_to_all_single(returned, unsorted, handle.sent, handle.received, group=self.group)
        choices = torch.empty_like(returned)
        choices[handle.order] = returned
        return choices


def module() -> ModuleType:
    """What ``import deep_ep`` is to find."""
    package = ModuleType("deep_ep")
    package.ElasticBuffer, package.topk_idx_t = ElasticBuffer, torch.int64  # type: ignore[attr-defined]
    package.__spec__ = __spec__
    return package
