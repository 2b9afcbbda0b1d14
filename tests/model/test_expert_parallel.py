"""The seam's arithmetic: names there and back, and one step of balancing."""

from __future__ import annotations

import pytest
import torch

from model import IceModel, ice_tiny
from model.expert_parallel import is_local_expert, routed_layers, to_plain_names, update_selection_biases


def engine_entries(model: IceModel) -> list[tuple[str, torch.Tensor]]:
    """The parameters as AutoEP names and splits them, all experts on one rank."""
    entries = []
    for name, parameter in model.named_parameters():
        prefix = name.rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):
            gate, up = parameter.chunk(2, dim=1)
            entries += [(f"{prefix}.w1", gate), (f"{prefix}.w3", up)]
        elif name.endswith("experts.down_proj"):
            entries.append((f"{prefix}.w2", parameter))
        elif name.endswith("router.weight"):
            entries.append((f"{prefix}.gate.weight", parameter))
        else:
            entries.append((name, parameter))
    return entries


@pytest.mark.parametrize("reverse", [False, True])
def test_engine_names_become_the_plain_models_whatever_their_order(reverse: bool) -> None:
    model = IceModel(ice_tiny().scaled_down())
    entries = engine_entries(model)
    plain = dict(to_plain_names(reversed(entries) if reverse else entries))
    expected = dict(model.named_parameters())
    assert plain.keys() == expected.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, expected[name]), name


def test_half_an_expert_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"core\.blocks\.0\.ffn\.experts"):
        list(to_plain_names([("core.blocks.0.ffn.experts.w1", torch.zeros(1, 2, 3))]))


def test_shared_experts_are_not_local_experts() -> None:
    assert is_local_expert("core.blocks.0.ffn.experts.w2")
    assert not is_local_expert("core.blocks.0.ffn.shared_experts.down_proj.weight")
    assert not is_local_expert("core.blocks.0.ffn.router.gate.weight")


def test_balancing_moves_each_bias_by_the_rate_against_its_load() -> None:
    model = IceModel(ice_tiny().scaled_down())
    layers = routed_layers(model)
    load = torch.full((len(layers), model.config.n_experts), 10)
    load[0, 0], load[0, 1] = 18, 2
    update_selection_biases(model, load, rate=0.25)
    first = layers[0].router.e_score_correction_bias
    assert first[:3].tolist() == [-0.25, 0.25, 0.0]
    assert not first[2:].any()
    assert all(not layer.router.e_score_correction_bias.any() for layer in layers[1:])


def test_balancing_evens_out_a_skewed_router() -> None:
    torch.manual_seed(0)
    model = IceModel(ice_tiny().scaled_down()).train()
    router = routed_layers(model)[0].router
    with torch.no_grad():
        router.weight[0] += 0.3  # expert 0 looks best to nearly all positive inputs
    inputs = torch.randn(512, model.config.dim).abs()
    imbalance = []
    for _ in range(800):
        load = router(inputs).tokens_per_expert_E
        imbalance.append(float(load.max() / load.double().mean()))
        update_selection_biases(model, torch.stack([load] * len(routed_layers(model))), rate=0.002)
    assert imbalance[0] > 2
    assert imbalance[-1] < 1.3
