"""The engine's experts with our arithmetic: DeepSpeed's results and DeepSpeed's parameters."""

from __future__ import annotations

import sys

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts

from launch.settings import BadInputError
from model.grouped_product import GroupedProduct, grouped_mm, loop
from pretrain.expert_compute import EngineExperts, expert_product


@pytest.mark.parametrize("product", [grouped_mm, loop], ids=["grouped_mm", "loop"])
def test_swapped_experts_keep_their_parameters_and_compute_what_deepspeeds_do(product: GroupedProduct) -> None:
    torch.manual_seed(0)
    experts = GroupedExperts(dim=8, hidden_dim=12, num_experts=3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    names = list(experts.state_dict())
    counts = torch.tensor([4, 0, 3], dtype=torch.int32)
    rows = torch.randn(7, 8, requires_grad=True)
    inputs = (rows, *experts.parameters())
    expected = experts(rows, counts)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)

    experts.__class__ = EngineExperts
    experts.product = product
    assert list(experts.state_dict()) == names
    actual = experts(rows, counts)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for got, want in zip(torch.autograd.grad(actual.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_missing_backend_is_a_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stk", None)
    with pytest.raises(BadInputError, match=r"parallel\.expert_backend"):
        expert_product("megablocks")
