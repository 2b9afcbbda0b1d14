"""ZeRO-3's step without the passes over memory that change nothing.

DeepSpeed's optimizer handles every gradient in ways that cost little beside a GPU's bandwidth and much beside a CPU's.
After ``deepspeed.initialize`` its class becomes :class:`LeanZero3`, which keeps its state and its arithmetic and leaves
out:

- flattening a sub-group's gradients into a new tensor when they already lie one behind the other in one buffer;
- on CPUs, a copy in float64 of all gradients for their norm: it is taken piece by piece, each fitting the cache;
- averaging over one rank: a group of one (each group of experts, when there are as many ranks as
  ``expert_parallel_size``) divides by 1 and sends to itself. No other rank is in that group, so none waits.

Measured on one rank with 57M parameters: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

_PIECE = 2**16  # numbers: half a megabyte in float64


class LeanZero3(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's ZeRO-3 optimizer; nothing is added to its state."""

    flatten: Callable[[list[Tensor]], Tensor]

    def get_grad_norm_direct(self, gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        """The norm over ranks, of pieces on a CPU: the norm of norms is the norm."""
        if gradients and gradients[0].is_cpu:
            pieces = [
                (piece, p) for g, p in zip(gradients, params, strict=True) for piece in g.reshape(-1).split(_PIECE)
            ]
            gradients, params = [piece for piece, _ in pieces], [p for _, p in pieces]
        norm: Tensor = super().get_grad_norm_direct(gradients, params, norm_type)
        return norm

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        stock = self.flatten
        self.flatten = _joined
        try:
            super()._prepare_fp32_grad_for_sub_group(sub_group_id)
        finally:
            self.flatten = stock

    # Its double underscore makes the name end in the class's own.
    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        group = self._get_param_partition_group(params_to_reduce[0])
        if dist.get_world_size(group) > 1 or self.gradient_predivide_factor != 1.0:
            stock = DeepSpeedZeroOptimizer_Stage3._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads
            reduced: list[Tensor] = stock(self, params_to_reduce, communication_data_type)
            return reduced
        self._assert_same_partition_group(params_to_reduce)
        ranks = self._gradient_averaging_world_size(params_to_reduce, 1)
        partitions = [p.grad.to(communication_data_type).reshape(-1) for p in params_to_reduce]
        if ranks != 1:
            partitions = [partition.mul(1.0 / ranks) for partition in partitions]
        return [partition.to(self.gradient_accumulation_dtype) for partition in partitions]


def _joined(tensors: list[Tensor]) -> Tensor:
    """The tensors one after the other: as a view where they already lie so, else a new tensor."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if (
            not tensor.is_contiguous()
            or tensor.dtype != first.dtype
            or tensor.data_ptr() != end
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return torch.cat([t.reshape(-1) for t in tensors])
        end += tensor.numel() * tensor.element_size()
    return first.as_strided((sum(t.numel() for t in tensors),), (1,), first.storage_offset())


def adopt_lean_zero(optimizer: Any) -> None:
    """After ``deepspeed.initialize``: give a ZeRO-3 optimizer our class; any other is left as it is."""
    if type(optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        return
    if optimizer.use_muon:
        from pretrain.muon import MuonZero3

        optimizer.__class__ = MuonZero3
    else:
        optimizer.__class__ = LeanZero3
