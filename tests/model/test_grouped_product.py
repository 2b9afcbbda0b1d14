"""Every backend multiplies as float64 does, forward and backward, and trains the same looped model."""

from __future__ import annotations

import pytest
import torch

from model import IceConfig, IceModel, ice_tiny
from model.expert_parallel import routed_layers, set_expert_product
from model.gradient_sum import summed_gradients
from model.grouped_product import GroupedProduct, expert_weights, grouped_mm, loop

PRODUCTS = {"grouped_mm": grouped_mm, "loop": loop}
GROUPS = {
    "ordinary": [3, 0, 5, 4],
    "one_expert": [0, 0, 12, 0],
    "nothing": [0, 0, 0, 0],
    "rows_past_the_end": [2, 3, 1, 1],
}


def by_definition(rows: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    groups = rows[: sum(sizes)].double().split(sizes)
    return torch.cat([group @ matrix.double().T for group, matrix in zip(groups, weight, strict=True)])


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_and_its_gradients_are_those_of_float64(
    product: GroupedProduct, sizes: list[int], summed: bool
) -> None:
    torch.manual_seed(0)
    used = sum(sizes)
    rows = torch.randn(12 if used else 0, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(4, 12, 8))
    offsets = torch.tensor(sizes).cumsum(0).int()
    weights = torch.randn(len(rows), 12, dtype=torch.float64)
    weights[used:] = 0  # what is there is unspecified, and nobody reads it

    expected = by_definition(rows, weight, sizes)
    wanted = torch.autograd.grad((expected * weights[:used]).sum(), (rows, weight))
    with summed_gradients([weight] if summed else []):
        actual = product(rows, weight, offsets)
    torch.testing.assert_close(actual[:used].double(), expected, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad((actual[:used].double() * weights[:used]).sum(), (rows, weight))
    torch.testing.assert_close(got[0][:used], wanted[0][:used].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], wanted[1].float(), rtol=1e-5, atol=1e-6)


def gradients(model: IceModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("remat", ["none", "loop"])
def test_backends_share_weights_and_train_the_same_model(remat: str) -> None:
    torch.manual_seed(0)
    config = IceConfig(
        vocab_size=64, dim=32, n_heads=4, n_kv_heads=2, ffn_dim=48, n_experts=8, n_experts_per_tok=2, expert_dim=16,
        prelude_layers=1, coda_layers=1, max_loop_iters=3, max_seq_len=16, max_output_tokens=16,
    )  # fmt: skip
    model = IceModel(config)
    model.set_remat(remat)  # type: ignore[arg-type]
    names, ids = list(model.state_dict()), torch.randint(0, 64, (2, 16))
    expected = gradients(model, ids)
    set_expert_product(model, loop)
    assert list(model.state_dict()) == names
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_weights_that_products_multiply_are_the_experts() -> None:
    model = IceModel(ice_tiny().scaled_down())
    found = expert_weights(model.core)
    wanted = [p for layer in routed_layers(model) for p in layer.module.experts.parameters()]
    assert [id(p) for p in found] == [id(p) for p in wanted]
    assert all(p.dim() == 3 for p in found)
