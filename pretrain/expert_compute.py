"""The engine's experts with our arithmetic: DeepSpeed's module, whose product can be chosen.

AutoEP puts a ``GroupedExperts`` (``w1`` gate, ``w2`` down, ``w3`` up) into each layer that it replaces. After
``deepspeed.initialize`` its class becomes :class:`EngineExperts`: hooks, parameters and checkpoints stay what they are,
and the three products go through a :class:`~model.grouped_product.GroupedProduct`, as in the plain model's ``Experts``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor, nn

from model.expert_parallel import routed_layers
from model.grouped_product import GroupedProduct, grouped_mm


class EngineExperts(GroupedExperts):
    """This rank's experts; ``product`` is an attribute of the instance or the class's default."""

    product: GroupedProduct = grouped_mm

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """(R, D) sorted by local expert to (R, D); rows past the counts' sum are unspecified."""
        offsets_E = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        gate, up = self.product(x, self.w1, offsets_E), self.product(x, self.w3, offsets_E)
        return self.product(F.silu(gate) * up, self.w2, offsets_E)


def adopt_engine_experts(model: nn.Module) -> None:
    """After ``deepspeed.initialize``: give every replaced layer's experts our class."""
    for layer in routed_layers(model):
        experts = layer.module.experts
        if isinstance(experts, GroupedExperts):
            experts.__class__ = EngineExperts
