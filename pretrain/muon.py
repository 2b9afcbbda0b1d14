r"""Muon for the hidden matrices, AdamW for the rest, under ZeRO-3 with expert parallelism.

    m <- beta m + (1 - beta) g;   u = (1 - beta) g + beta m           momentum, looked ahead (Nesterov)
    W <- (1 - lr wd) W - lr sqrt(max(1, rows / columns)) NS(u)        NS: nearly the orthogonal factor of u

(Jordan et al. 2024; Newton-Schulz in DeepSpeed's "gram" form, fp16 on GPUs, fp32 on CPUs.) Muon's are the projections
of attention, feed-forwards, shared and routed experts, each expert's matrix by itself; a fused projection (queries,
keys and values; gate and up of the dense layers) is one matrix. Embedding, head, routers, adapters, gates, norms and
the injection stay with AdamW.

The engine does it: :class:`~deepspeed.runtime.zero.muon.muon_optimizer.MuonWithAuxAdam` is the optimizer, and ZeRO-3
gathers each matrix's gradient and momentum, orthogonalises a share of them on each rank and passes them round. Three
things DeepSpeed 0.19.8 does otherwise, and this file mends in :class:`MuonZero3`:

- It knows Muon's parameters by a mark that AutoEP's new parameters lack, and would take in the head and the routers.
  Here the optimizer groups say it.
- It clips by the norm of the *updates*. An orthogonal matrix has the norm sqrt(rank): hundreds in all, so that
  ``grad_clip = 1`` would shrink every update by hundreds. Here gradients are clipped by their own norm before they
  enter the momentum, and that norm is the one reported.
- In fp32 and bf16 it looks for numbers that are not finite after momenta have moved. Here before: a skipped step
  changes nothing.

Cost: momentum in the run's dtype, 2 or 4 bytes a number, instead of Adam's 8; gradients are all-reduced rather than
reduce-scattered (DeepSpeed demands it, twice the bytes), and each step gathers the gradient and the momentum of every
matrix, and hands them out again: twice the ranks times the largest matrix at once (``launch/planning/muon.py``).
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, is_invalid_grad_norm
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
from torch import Tensor, nn

from pretrain.lean_zero import LeanZero3

if TYPE_CHECKING:
    from pretrain.config import OptimSection

_HIDDEN_MATRIX = re.compile(r"\b(attention|ffn)\.(?!router\.|gate\.)")


def is_muons(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates the parameter called ``name``; under zero.Init its shape is read from ``ds_shape``."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 2 and _HIDDEN_MATRIX.search(name) is not None


def build_optimizer(groups: list[dict[str, Any]], settings: OptimSection) -> MuonWithAuxAdam:
    """The optimizer of ``groups`` (``use_muon`` says whose they are), after AutoEP has put its parameters into them."""
    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    if any(is_moe_param(parameter) for group in groups for parameter in group["params"]):
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    groups = [group for group in groups if group["params"]]
    return MuonWithAuxAdam(
        groups,
        adam_optimizer=torch.optim.AdamW,
        adam_optimizer_kwargs={
            "lr": settings.lr,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.eps,
            "fused": True,
        },
    )


class MuonZero3(LeanZero3):
    """DeepSpeed's ZeRO-3 with Muon, clipped and checked by the gradients."""

    _gradient_norms: list[Tensor]

    def _apply_muon_to_accumulated_grads(self) -> None:
        self._gradient_norms = super()._get_norm_groups()
        norm = combine_grad_norm_groups(self._gradient_norms)
        if is_invalid_grad_norm(norm):
            return  # step() looks at the norm next, and skips
        if self.clip_grad > 0:
            factor = self.clip_grad / torch.clamp(norm + 1e-6, min=self.clip_grad)
            for sub_group, is_muon in enumerate(self.sub_groups_using_muon):
                if is_muon:
                    for gradient in self.averaged_gradients[sub_group]:
                        gradient.mul_(factor)
        # DeepSpeed compiles the iteration; on a CPU that takes longer than all of it.
        eager = torch.compiler.set_stance("force_eager") if self.device == "cpu" else contextlib.nullcontext()
        with eager:
            super()._apply_muon_to_accumulated_grads()

    def _get_norm_groups(self) -> list[Tensor]:
        return self._gradient_norms

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        """Clip AdamW's gradients; an orthogonalised update is applied as it is."""
        if not self.sub_groups_using_muon[sub_group_id]:
            super().unscale_and_clip_grads(sub_group_id, total_norm)
