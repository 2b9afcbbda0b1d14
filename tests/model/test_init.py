import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import IceConfig, IceModel, ice_tiny
from model.expert_parallel import routed_layers
from model.init import decays, experts_without_memory, matrix_std, output_std
from model.parameters import meta_model

CONFIGS = {
    "gqa": IceConfig(qk_norm=True, initial_state="learned").scaled_down(),
    "mla_act": IceConfig(attn_type="mla", q_lora_rank=64, act=True).scaled_down(),
    "tied": IceConfig(tie_embeddings=True).scaled_down(),
}


@pytest.mark.parametrize("n_loops", [1, 4, 16])
@pytest.mark.parametrize("tied", [False, True])
def test_first_loss_is_that_of_uniform_guessing(tied: bool, n_loops: int) -> None:
    config = ice_tiny(tie_embeddings=tied)
    model = IceModel(config)
    ids = torch.randint(0, config.vocab_size, (2, 129))
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1], n_loops).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), abs=0.1)


def test_core_updates_shrink_with_depth_so_that_the_streams_growth_does_not() -> None:
    growth = []
    for loops in (4, 64):
        config = IceConfig.model_validate(CONFIGS["gqa"].model_dump() | {"max_loop_iters": loops})
        model = IceModel(config)
        torch.nn.init.constant_(model.core.injection.log_A, -math.inf)  # the slowest forgetting: updates add up
        torch.nn.init.constant_(model.core.injection.log_dt, -math.inf)
        torch.nn.init.zeros_(model.core.injection.gain)
        sizes: list[float] = []
        model.core.register_forward_hook(lambda module, args, out, sizes=sizes: sizes.append(out.h_BSD.pow(2).mean()))
        with torch.no_grad():
            model(torch.randint(0, config.vocab_size, (2, 32)))
        growth.append(math.sqrt(sizes[0]))
    assert growth[1] < 4 * growth[0]


def test_no_module_touches_parameters_after_the_init_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``deepspeed.zero.Init`` needs: it takes a module's own parameters away when that module's init returns."""
    classes = {type(module) for config in CONFIGS.values() for module in IceModel(config).modules()}
    ours = [cls for cls in classes if cls.__module__.startswith("model.")]
    versions: dict[int, tuple[torch.Tensor, int]] = {}

    for cls in ours:
        original = cls.__init__

        def init(self: nn.Module, *args: Any, original: Any = original, cls: type = cls, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if type(self) is cls:
                for parameter in self.parameters(recurse=False):
                    versions.setdefault(id(parameter), (parameter, parameter._version))

        monkeypatch.setattr(cls, "__init__", init)
    for config in CONFIGS.values():
        versions.clear()
        model = IceModel(config)
        for name, parameter in model.named_parameters():
            assert id(parameter) in versions, f"{name} belongs to a module that is not ours"
            assert parameter._version == versions[id(parameter)][1], name


@pytest.mark.parametrize("name", CONFIGS)
def test_model_builds_on_the_meta_device_with_the_same_parameters(name: str) -> None:
    real, meta = IceModel(CONFIGS[name]), meta_model(CONFIGS[name])
    assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_decay_touches_matrices_only() -> None:
    spared, touched = set(), set()
    for config in CONFIGS.values():
        for name, parameter in IceModel(config).named_parameters():
            (touched if decays(name, parameter) else spared).add(name)
    assert {
        "embed.weight",
        "core.injection.log_A",
        "core.injection.log_dt",
        "core.injection.gain",
        "core.step_embedding.gain",
        "core.initial_state",
        "core.halting.weight",
        "core.halting.bias",
        "core.norm.weight",
        "core.blocks.0.attention.q_norm.weight",
        "norm.weight",
    } <= spared
    assert {
        "head.weight",
        "core.blocks.0.attention.qkv_proj.weight",
        "core.blocks.0.ffn.router.weight",
        "core.blocks.0.ffn.experts.gate_up_proj",
        "core.blocks.0.ffn.experts.down_proj",
        "prelude.0.ffn.down_proj.weight",
    } <= touched
    assert not any("norm" in name for name in touched)


def test_decay_reads_the_shape_before_zero3_partitioned_it() -> None:
    flat = nn.Parameter(torch.empty(0))
    flat.ds_shape = torch.Size((4, 4))
    assert decays("core.blocks.0.attention.o_proj.weight", flat)


def test_a_seed_fixes_the_model() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(11)
        models.append(IceModel(CONFIGS["gqa"]).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def experts_of(config: IceConfig) -> list[Any]:
    torch.manual_seed(11)
    return [layer.module.experts for layer in routed_layers(IceModel(config))]


def test_any_part_of_the_experts_can_be_drawn_alone() -> None:
    config = IceConfig(recurrent_layers=2).scaled_down()
    for experts in experts_of(config):
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        down = experts.down_proj.detach()
        for first, end in ((0, 1), (3, 4), (2, config.n_experts)):
            drawn = [torch.full_like(whole[first:end], torch.nan) for whole in (gate, up, down)]
            experts.draws.fill(*drawn, first_expert=first)
            assert all(map(torch.equal, drawn, (gate[first:end], up[first:end], down[first:end])))
        half = [torch.empty_like(whole, dtype=torch.bfloat16) for whole in (gate, up, down)]
        experts.draws.fill(*half)
        assert all(torch.equal(ours, whole.bfloat16()) for ours, whole in zip(half, (gate, up, down), strict=True))


def test_no_two_matrices_of_experts_are_alike_and_each_has_its_spread() -> None:
    config = IceConfig.model_validate(
        IceConfig(recurrent_layers=2).scaled_down().model_dump() | {"dim": 64, "expert_dim": 64, "ffn_dim": 64}
    )
    layers = experts_of(config)
    matrices = torch.cat(
        [torch.cat((*layer.gate_up_proj.detach().chunk(2, dim=1), layer.down_proj.detach())) for layer in layers]
    ).flatten(1)
    spread = [matrix_std(64)] * 2 * config.n_experts + [output_std(config, 64)] * config.n_experts
    torch.testing.assert_close(matrices.std(dim=1), torch.tensor(spread * 2), rtol=0.06, atol=0)
    correlation = torch.corrcoef(matrices).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(matrices.shape[1])


def test_experts_without_memory_change_nothing_else_and_keep_their_draws() -> None:
    config = IceConfig(recurrent_layers=2, msrd_scales=(1, 2)).scaled_down()
    torch.manual_seed(11)
    with experts_without_memory():
        empty = IceModel(config)
    torch.manual_seed(11)
    whole = IceModel(config)
    for (name, parameter), expected in zip(empty.named_parameters(), whole.parameters(), strict=True):
        if ".experts." in name:
            assert parameter.is_meta
            assert parameter.shape == expected.shape
        else:
            assert torch.equal(parameter, expected), name
    for layer, expected_layer in zip(routed_layers(empty), routed_layers(whole), strict=True):
        down = torch.empty_like(expected_layer.module.experts.down_proj)
        gate_up = torch.empty_like(expected_layer.module.experts.gate_up_proj)
        layer.module.experts.draws.fill(*gate_up.chunk(2, dim=1), down)
        assert torch.equal(down, expected_layer.module.experts.down_proj)
        assert torch.equal(gate_up, expected_layer.module.experts.gate_up_proj)
