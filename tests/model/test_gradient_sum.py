"""One buffer for a looped weight's gradient: exact whatever is asked of the graph, gone when the forward is over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.gradient_sum import gradient_sum_of, summed_gradients
from model.grouped_product import grouped_mm

OFFSETS = torch.tensor([2, 5], dtype=torch.int32)


def looped(rows: Tensor, weight: nn.Parameter, loops: int = 3, summed: bool = True) -> Tensor:
    with summed_gradients([weight] if summed else []):
        for _ in range(loops):
            rows = grouped_mm(rows, weight, OFFSETS)
    return rows


def inputs() -> tuple[Tensor, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(2, 4, 4, generator=generator) / 2)
    return torch.randn(5, 4, generator=generator, requires_grad=True), weight


def gradient(output: Tensor, weight: nn.Parameter, **options: bool) -> Tensor:
    (found,) = torch.autograd.grad(output.square().sum(), weight, **options)
    return found


def test_the_sum_is_autograds() -> None:
    rows, weight = inputs()
    expected = gradient(looped(rows, weight, summed=False), weight)
    torch.testing.assert_close(gradient(looped(rows, weight), weight), expected, rtol=1e-5, atol=1e-6)


def test_a_graph_can_be_walked_twice_and_for_other_gradients_first() -> None:
    rows, weight = inputs()
    output = looped(rows, weight)
    torch.autograd.grad(output.sum(), rows, retain_graph=True)
    first = gradient(output, weight, retain_graph=True)
    assert torch.equal(gradient(output, weight), first)
    torch.testing.assert_close(first, gradient(looped(rows, weight, summed=False), weight), rtol=1e-5, atol=1e-6)


def test_two_forwards_before_their_backwards_do_not_mix() -> None:
    rows, weight = inputs()
    short, long = looped(rows, weight, loops=1), looped(rows, weight, loops=4)
    expected = gradient(looped(rows, weight, loops=1, summed=False), weight)
    gradient(long, weight)
    torch.testing.assert_close(gradient(short, weight), expected, rtol=1e-5, atol=1e-6)


def test_another_use_of_the_weight_adds_to_the_sum() -> None:
    rows, weight = inputs()
    penalty = weight.square().sum()
    (found,) = torch.autograd.grad(looped(rows, weight).square().sum() + penalty, weight)
    expected = gradient(looped(rows, weight, summed=False), weight) + 2 * weight
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_stays_on_the_weight_and_nothing_is_made_without_a_graph() -> None:
    rows, weight = inputs()
    looped(rows, weight)
    assert gradient_sum_of(weight) is None
    with torch.no_grad(), summed_gradients([weight]):
        assert gradient_sum_of(weight) is None


def test_a_weight_that_is_not_whole_has_no_sum() -> None:
    with summed_gradients([nn.Parameter(torch.empty(0))]) as nothing:
        assert nothing is None
    empty = nn.Parameter(torch.empty(0))
    with summed_gradients([empty]):
        assert gradient_sum_of(empty) is None
