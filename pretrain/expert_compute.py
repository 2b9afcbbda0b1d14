"""The engine's experts with our arithmetic: DeepSpeed's module, whose product can be chosen.

AutoEP puts a ``GroupedExperts`` (``w1`` gate, ``w2`` down, ``w3`` up) into each layer that it replaces. After
``deepspeed.initialize`` its class becomes :class:`EngineExperts`: hooks, parameters and checkpoints stay what they are,
and the three products go through a :class:`~model.grouped_product.GroupedProduct`, as in the plain model's ``Experts``.
"""

from __future__ import annotations

import torch
from deepspeed.moe import ep_kernels
from deepspeed.moe.ep_experts import GroupedExperts
from torch import Tensor, nn

from launch.settings import BadInputError
from model.expert_parallel import routed_layers, set_expert_product
from model.grouped_product import GroupedProduct, grouped_mm, loop
from model.megablocks import megablocks
from model.swiglu import swiglu_of

_STOCK_ALIGNMENT: int = ep_kernels.TOKEN_GROUP_ALIGN_SIZE_M


class EngineExperts(GroupedExperts):
    """This rank's experts; ``product`` is set on the instance."""

    product: GroupedProduct

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        """(R, D) sorted by local expert to (R, D); rows past the counts' sum are unspecified."""
        offsets_E = num_tokens_per_expert.cumsum(0, dtype=torch.int32)
        gate, up = self.product(x, self.w1, offsets_E), self.product(x, self.w3, offsets_E)
        return self.product(swiglu_of(gate, up), self.w2, offsets_E)


def expert_product(backend: str) -> GroupedProduct:
    """The product that ``parallel.expert_backend`` names.

    Raises:
        BadInputError: When its packages are missing.
    """
    if backend == "megablocks":
        try:
            return megablocks()
        except ModuleNotFoundError as error:
            raise BadInputError(f'parallel.expert_backend = "megablocks": {error}') from error
    products: dict[str, GroupedProduct] = {"grouped_mm": grouped_mm, "loop": loop}
    return products[backend]


def adopt_engine_experts(model: nn.Module, product: GroupedProduct) -> None:
    """After ``deepspeed.initialize``: give every replaced layer's experts our class, and all experts ``product``."""
    for layer in routed_layers(model):
        experts = layer.module.experts
        if isinstance(experts, GroupedExperts):
            experts.__class__ = EngineExperts
    set_expert_product(model, product)
    # AutoEP pads each expert's rows to a multiple of this.
    ep_kernels.TOKEN_GROUP_ALIGN_SIZE_M = max(_STOCK_ALIGNMENT, product.row_alignment)
