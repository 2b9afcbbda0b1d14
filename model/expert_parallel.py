"""The seam between the plain MoE layer and the one DeepSpeed's AutoEP puts in its place.

Inside ``deepspeed.initialize`` every ``MoELayer`` of the core becomes an ``AutoEPMoELayer``: the router keeps its
function under another parameter name, and each rank keeps ``E / expert_parallel_size`` experts in three tensors::

    plain model                       engine
    router.weight          (E, D)     router.gate.weight   (E, D)
    experts.gate_up_proj   (E, 2F, D) experts.w1, .w3      (E_local, F, D) each: gate, up
    experts.down_proj      (E, D, F)  experts.w2           (E_local, D, F)
    router.e_score_correction_bias    the same name, a buffer

What AutoEP does not do is added here: the selection bias stays in fp32 (a bf16 engine casts buffers, and a bias of
0.5 cannot take steps of 0.001 in bf16), the load is counted per (loop, layer, expert), and weights are converted back
to the plain names. Nothing here imports DeepSpeed: the replaced layers are known by their shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.expert_load import ExpertLoad
from model.grouped_product import GroupedProduct
from model.moe import MoELayer

MOE_LAYER_PATTERN = r"core\.(scales\.\d+\.)?blocks\.\d+\.ffn"  # full names of the modules the engine replaces
ROUTER = "router"
EXPERTS = "experts"
SHARED_EXPERTS = "shared_experts"
GATE_UP_PROJ = "gate_up_proj"
DOWN_PROJ = "down_proj"
SELECTION_BIAS = "e_score_correction_bias"

_ENGINE_GATE, _ENGINE_DOWN, _ENGINE_UP = "w1", "w2", "w3"
_ENGINE_ROUTER_SUFFIX = f"{ROUTER}.gate.weight"


class RoutedLayer(NamedTuple):
    """A mixture-of-experts layer inside a model, plain or replaced by the engine."""

    name: str
    module: nn.Module

    @property
    def router(self) -> Any:
        """The module that scores and selects; holds the selection bias."""
        return getattr(self.module, ROUTER)


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    """Every MoE layer of ``model``, in the order of its modules: the layer index of the load counts."""
    return [
        RoutedLayer(name, module)
        for name, module in model.named_modules()
        if hasattr(module, ROUTER) and hasattr(module, EXPERTS)
    ]


def router_weight(layer: nn.Module) -> Tensor:
    """The (E, D) matrix an MoE layer scores its experts with, plain or replaced."""
    router: Any = getattr(layer, ROUTER)
    weight: Tensor = router.weight if isinstance(layer, MoELayer) else router.gate.weight
    return weight


def routed_output(layer: nn.Module, x_ND: Tensor) -> Tensor:
    """What the routed experts of an MoE layer alone add, (N, D) to (N, D); N may be 0.

    A replaced layer runs its all-to-alls, so every rank of its group must call this equally often, and backpropagate
    through it equally often: also a rank without tokens, with an ``x_ND`` that requires a gradient if the others' does.
    """
    if isinstance(layer, MoELayer):
        return layer.routed(x_ND)
    # AutoEP adds its shared experts itself, and has no switch for that.
    shared_experts = getattr(layer, SHARED_EXPERTS)
    setattr(layer, SHARED_EXPERTS, None)
    try:
        output_ND: Tensor = layer(x_ND.unsqueeze(0)).squeeze(0)
        return output_ND
    finally:
        setattr(layer, SHARED_EXPERTS, shared_experts)


def shared_output(layer: nn.Module, x_BSD: Tensor) -> Tensor | None:
    """What the shared experts of an MoE layer add, (B, S, D); None when it has none."""
    shared_experts = getattr(layer, SHARED_EXPERTS, None)
    return None if shared_experts is None else shared_experts(x_BSD)


def set_expert_product(model: nn.Module, product: GroupedProduct) -> None:
    """Let ``product`` multiply in every routed layer, plain or replaced (with ``pretrain.expert_compute``'s class)."""
    for layer in routed_layers(model):
        experts: Any = getattr(layer.module, EXPERTS)
        experts.product = product


def adopt_replaced_layers(model: nn.Module, expert_load: ExpertLoad) -> None:
    """After ``deepspeed.initialize``: keep selection biases in fp32 and count the load of the replaced routers."""
    for index, layer in enumerate(routed_layers(model)):
        router = layer.router
        router.register_buffer(SELECTION_BIAS, getattr(router, SELECTION_BIAS).float())
        if not hasattr(router, "expert_load"):  # a plain router counts by itself
            router.register_forward_hook(_CountLoad(expert_load, index))


class _CountLoad:
    """Forward hook of a replaced router, whose third output is the number of tokens of each expert."""

    def __init__(self, expert_load: ExpertLoad, layer: int) -> None:
        self.expert_load, self.layer = expert_load, layer

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if module.training:
            self.expert_load.add(self.layer, outputs[2])


@torch.no_grad()
def update_selection_biases(model: nn.Module, load_LE: Tensor, rate: float) -> None:
    """Auxiliary-loss-free balancing (Wang et al. 2024; DeepSeek-V3, section 2.1.2), once per optimizer step.

    ``bias += rate * sign(mean load - load)`` for each layer, so that an expert with too many tokens is chosen less
    often. ``load_LE``: tokens of each (layer, expert), summed over loops, micro-batches and all ranks.
    """
    for layer, load_E in zip(routed_layers(model), load_LE.double(), strict=True):
        bias_E = getattr(layer.router, SELECTION_BIAS)
        bias_E.add_(torch.sign(load_E.mean() - load_E).to(bias_E), alpha=rate)


def is_local_expert(engine_name: str) -> bool:
    """Whether a parameter of the engine's model holds only this rank's experts."""
    parts = engine_name.split(".")
    return len(parts) >= 2 and parts[-2] == EXPERTS and parts[-1] in (_ENGINE_GATE, _ENGINE_DOWN, _ENGINE_UP)


def stored_parts(engine_names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of each tensor of the plain model, the engine's tensors that it is made of, as in :func:`to_plain_names`.

    Where there are several, they lie one behind the other in every expert (along the second dimension).
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in engine_names:
        prefix, _, last = name.rpartition(".")
        if not is_local_expert(name):
            if name.endswith(_ENGINE_ROUTER_SUFFIX):
                found[f"{name.removesuffix(_ENGINE_ROUTER_SUFFIX)}{ROUTER}.weight"] = (name,)
            else:
                found[name] = (name,)
        elif last == _ENGINE_DOWN:
            found[f"{prefix}.{DOWN_PROJ}"] = (name,)
        else:
            found[f"{prefix}.{GATE_UP_PROJ}"] = (f"{prefix}.{_ENGINE_GATE}", f"{prefix}.{_ENGINE_UP}")
    return found


def to_plain_names(entries: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Engine names and whole tensors (all experts) to the plain model's; ``w1`` waits for its ``w3``."""
    gates: dict[str, Tensor] = {}
    for name, tensor in entries:
        prefix, _, last = name.rpartition(".")
        if not is_local_expert(name):
            if name.endswith(_ENGINE_ROUTER_SUFFIX):
                name = f"{name.removesuffix(_ENGINE_ROUTER_SUFFIX)}{ROUTER}.weight"
            yield name, tensor
        elif last == _ENGINE_DOWN:
            yield f"{prefix}.{DOWN_PROJ}", tensor
        elif prefix in gates:
            other = gates.pop(prefix)
            gate, up = (tensor, other) if last == _ENGINE_GATE else (other, tensor)
            yield f"{prefix}.{GATE_UP_PROJ}", torch.cat([gate, up], dim=1)
        else:
            gates[prefix] = tensor
    if gates:
        raise ValueError(f"experts without both {_ENGINE_GATE} and {_ENGINE_UP}: {', '.join(gates)}")
