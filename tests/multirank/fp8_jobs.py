"""Jobs for a rank pool about FP8 in the engine."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from rank_jobs import changed_deepspeed_config, end_engine, micro_batches, start_engine, train_on
from scenarios import Step, Trace
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from model.fp8.conversion import Fp8Linear
from model.fp8.products import DenseProduct, Fp8GroupedProduct

NOTHING_KEPT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
}


def train_and_say(values: dict[str, Any], steps: list[Step]) -> tuple[Trace, list[str]]:
    """A scenario's trace, and what the engine says of FP8."""
    engine = start_engine(values)
    trace = train_on(engine, steps, gradients=True)
    end_engine(engine)
    return trace, engine.fp8


def train_and_count_rows_sent(values: dict[str, Any], steps: list[Step]) -> tuple[Trace, list[str], dict[str, int]]:
    """The same, and bytes of the rows this rank sent by all-to-all, by dtype (counts of rows are int32)."""
    import deepspeed.comm

    sent: dict[str, int] = {}
    original = deepspeed.comm.all_to_all_single

    def counting(output: Tensor, tensor: Tensor, *arguments: Any, **keys: Any) -> Any:
        kind = str(tensor.dtype).removeprefix("torch.")
        sent[kind] = sent.get(kind, 0) + tensor.numel() * tensor.element_size()
        return original(output, tensor, *arguments, **keys)

    with mock.patch.object(deepspeed.comm, "all_to_all_single", counting):
        trace, said = train_and_say(values, steps)
    return trace, said, sent


def storages_after_forward(values: dict[str, Any], as_views: bool) -> dict[str, tuple[int, int]]:
    """Gathered weights that FP8 multiplied with, linear layers' and experts': how many, and how many are still there.

    ``as_views`` is what must not be done: the products of autograd's own, which save transposed views.
    """
    seen: dict[str, list[StorageWeakRef]] = {"linears": [], "experts": []}
    dense, grouped = DenseProduct.__call__, Fp8GroupedProduct.__call__

    def watched_dense(self: DenseProduct, x: Tensor, weight: Tensor) -> Tensor:
        seen["linears"].append(StorageWeakRef(weight.untyped_storage()))
        return x @ weight.t() if as_views else dense(self, x, weight)

    def watched_grouped(self: Fp8GroupedProduct, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        seen["experts"].append(StorageWeakRef(weight.untyped_storage()))
        if as_views:
            return torch._grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)
        return grouped(self, rows, weight, offsets)

    with contextlib.ExitStack() as changes:
        changes.enter_context(changed_deepspeed_config("zero_optimization", **NOTHING_KEPT))
        changes.enter_context(mock.patch.object(DenseProduct, "__call__", watched_dense))
        changes.enter_context(mock.patch.object(Fp8GroupedProduct, "__call__", watched_grouped))
        engine = start_engine(values)
        assert any(isinstance(module, Fp8Linear) for module in engine.model.modules())
        train_on(engine, [Step(2)])  # ZeRO-3 records its trace
        for refs in seen.values():
            refs.clear()
        inputs, _ = next(micro_batches(engine, 1))
        output = engine.forward(inputs, 2)
        alive = {kind: (len(refs), sum(not ref.expired() for ref in refs)) for kind, refs in seen.items()}
        engine.backward(output.logits.float().square().mean())
        end_engine(engine)
    return alive
