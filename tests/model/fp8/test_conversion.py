"""Which matrices multiply in FP8, and that nothing else changes."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import IceConfig, IceModel
from model.expert_parallel import routed_layers
from model.fp8 import BLOCKWISE, ROWWISE, Emulated, Fp8GroupedProduct, Fp8Part, convert
from model.fp8.conversion import Fp8Linear
from model.grouped_product import GroupedMM
from model.remat import RematPolicy

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "max_seq_len": 32,
    "max_output_tokens": 8,
    "prelude_layers": 1,
    "recurrent_layers": 1,
    "coda_layers": 1,
    "max_loop_iters": 3,
    "n_heads": 2,
    "n_kv_heads": 2,
    "ffn_dim": 48,
    "n_experts": 4,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 16,
}
GQA = ("attention.o_proj", "attention.qkv_proj")
DENSE = ("ffn.down_proj", "ffn.gate_up_proj")
SHARED = ("ffn.shared_experts.down_proj", "ffn.shared_experts.gate_up_proj")
ALL = {
    *(f"{place}.0.{name}" for place in ("prelude", "coda") for name in (*GQA, *DENSE)),
    *(f"core.blocks.0.{name}" for name in (*GQA, *SHARED)),
}


def model_of(**fields: Any) -> IceModel:
    return IceModel(IceConfig.model_validate(BASE | fields))


def converted(model: IceModel, *exclude: Fp8Part, recipe: Any = ROWWISE) -> set[str]:
    """The linear layers that were; experts count as one."""
    done = convert(model, model.config, Emulated(recipe), exclude)
    assert set(done.linears) == {n for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
    products = {type(layer.module.experts.product) for layer in routed_layers(model)}
    assert products <= {Fp8GroupedProduct if done.experts else GroupedMM}
    return {*done.linears, *(["experts"] if done.experts else [])}


@pytest.mark.parametrize(
    ("exclude", "stays"),
    [
        ((), set()),
        (("attention",), {name for name in ALL if ".attention." in name}),
        (("feed_forward",), {name for name in ALL if ".ffn." in name and "shared" not in name}),
        (("shared_experts",), {name for name in ALL if "shared" in name}),
        (("experts",), {"experts"}),
        (("prelude", "coda"), {name for name in ALL if not name.startswith("core")}),
        (("core",), {name for name in ALL if name.startswith("core")} | {"experts"}),
    ],
)
def test_excluded_parts_stay_in_high_precision(exclude: tuple[Fp8Part, ...], stays: set[str]) -> None:
    assert converted(model_of(), *exclude) == (ALL | {"experts"}) - stays


def test_what_decides_or_is_small_is_never_converted() -> None:
    """Router, head, embeddings, adapters, gates, halting and depth heads, whatever the architecture."""
    wide = {"dim": 64, "n_heads": 16, "n_kv_heads": 16}  # a gate of 16 heads would fit
    ideas = {"lora_rank": 16, "slu": True, "act": True, "msrd_scales": (1, 2), "kv_policy": "gated"}
    model = model_of(**wide, **ideas, attn_type="gqa")
    names = converted(model)
    assert names
    assert all(
        name.rsplit(".", 1)[-1] in {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "experts"} for name in names
    )
    assert not any("adapters" in name or "depth_heads" in name or "halting" in name for name in names)
    assert any("core.scales.1.blocks.0.attention.attention.qkv_proj" in name for name in names)


def test_every_projection_of_latent_attention_is_converted() -> None:
    ranks = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    names = converted(model_of(attn_type="mla", **ranks))
    assert {"q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"} <= {name.rsplit(".", 1)[-1] for name in names}


def test_sizes_the_kernels_cannot_load_are_left_and_named() -> None:
    model = model_of(ffn_dim=40, expert_dim=24)
    done = convert(model, model.config, Emulated(ROWWISE), ())
    assert not done.experts
    assert set(done.unaligned) == {
        *(f"{place}.0.ffn.down_proj" for place in ("prelude", "coda")),
        "core.blocks.0.ffn.shared_experts.down_proj",
        "the routed experts",
    }
    assert "not a multiple of 16 in size, so not in prelude.0.ffn.down_proj" in str(done)


def loss_and_gradients(model: IceModel, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = F.cross_entropy(model(ids[:, :-1], 3).flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", [ROWWISE, BLOCKWISE], ids=lambda recipe: recipe.name)
def test_a_model_in_fp8_stores_the_same_and_computes_nearly_the_same(recipe: Any) -> None:
    model = model_of()
    ids = torch.randint(0, 64, (2, 17))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    high_loss, high = loss_and_gradients(model, ids)
    converted(model, recipe=recipe)
    loss, gradients = loss_and_gradients(model, ids)

    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert gradients.keys() == high.keys()
    assert 0 < abs(loss - high_loss) < 0.01 * high_loss
    for name, gradient in gradients.items():
        if gradient.dim() > 1 and high[name].norm() > 1e-4:
            assert F.cosine_similarity(gradient.flatten(), high[name].flatten(), dim=0) > 0.98, name

    for policy in get_args(RematPolicy):
        model.set_remat(policy)
        again_loss, again = loss_and_gradients(model, ids)
        assert torch.equal(again_loss, loss), policy
        assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items()), policy


def test_other_models_are_left_alone() -> None:
    first, second = model_of(), model_of()
    converted(first)
    assert not any(isinstance(module, Fp8Linear) for module in second.modules())
    linear = first.get_submodule("prelude.0.ffn.down_proj")
    assert isinstance(linear, nn.Linear)
    assert linear(torch.randn(2, 3, 48)).shape == (2, 3, 32)
