"""Starting with its own experts only: no rank ever holds, or gathers, a whole layer of them.

AutoEP makes a rank's experts by cutting them out of a layer that is whole: under ``zero.Init`` every rank builds all
experts of a layer, shards them over all ranks, and gathers them again to keep ``E / expert_parallel_size``. For ice_1t
that is 365 GiB at once. Here the same steps run, with nothing in them:

    1. the model is built    its routed experts are shapes (``model.init.experts_without_memory``); zero.Init skips them
    2. AutoEP replaces       allocates this rank's experts, from views that show one number in the right shape
    3. the new layer fills   its experts by :class:`~model.init.ExpertDraws`: the bits of the plain model, on any ranks
    4. ZeRO-3 shards them    over the ranks that hold the same ones, before the next layer is replaced

At most one layer's own experts, and one more matrix in fp32, are there beside what is sharded already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep_config import MoELayerSpec
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn

from model.moe import Experts, MoELayer


class ZeroInit(deepspeed.zero.Init):  # type: ignore[misc]
    """Partitions each module's parameters as it is built, except routed experts, which have no memory yet."""

    def _post_init_method(self, module: nn.Module) -> None:
        if not isinstance(module, Experts):
            super()._post_init_method(module)


class _FillingLayer(AutoEPMoELayer):
    """AutoEP's layer, which draws its experts when it is made instead of copying them."""

    def __init__(self, spec: MoELayerSpec, source_module: MoELayer, ep_size: int, ep_rank: int, **options: Any) -> None:
        super().__init__(spec=spec, source_module=source_module, ep_size=ep_size, ep_rank=ep_rank, **options)
        experts = self.experts
        source_module.experts.draws.fill(
            experts.w1.data, experts.w3.data, experts.w2.data, first_expert=ep_rank * self.num_local_experts
        )


@contextlib.contextmanager
def own_experts_only(device: str) -> Iterator[None]:
    """Call ``deepspeed.initialize`` inside; a rank's experts are made on ``device``."""

    def views(experts_source: Experts, spec: MoELayerSpec, ep_rank: int, ep_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What AutoEP copies into its new w1, w2 and w3 (gate, down, up)."""
        number = torch.zeros((), dtype=experts_source.down_proj.dtype, device=device)
        here, hidden, dim = spec.num_experts // ep_size, spec.ffn_hidden_size, spec.hidden_size
        return number.expand(here, hidden, dim), number.expand(here, dim, hidden), number.expand(here, hidden, dim)

    stock = auto_ep_layer.repack_expert_weights
    auto_ep_layer.repack_expert_weights, auto_ep_layer.AutoEPMoELayer = views, _FillingLayer
    try:
        yield
    finally:
        auto_ep_layer.repack_expert_weights, auto_ep_layer.AutoEPMoELayer = stock, AutoEPMoELayer
