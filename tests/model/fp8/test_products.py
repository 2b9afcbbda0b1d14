"""FP8 products and their gradients: against float64 on dequantised operands, torchao, and what high precision gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model.fp8 import BLOCKWISE, RECIPES, ROWWISE, DenseProduct, Emulated, Fp8GroupedProduct, Recipe
from model.fp8.scaling import Tile, dequantise, quantise

OFFSETS = torch.tensor([10, 10, 33, 45], dtype=torch.int32)  # the second expert has no rows; rows 45 to 49 are no one's


def reread(x: Tensor, tile: Tile) -> Tensor:
    """What the eight-bit tensor stands for, in float64."""
    return dequantise(quantise(x.detach(), tile), tile).double()


def dense_operands() -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.randn(4, 10, 288) * torch.exp2(torch.randint(-6, 6, (4, 10, 1)).float())
    return rows.requires_grad_(), torch.randn(160, 288, requires_grad=True), torch.randn(4, 10, 160) * 1e-5


def grouped_operands() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(50, 160, requires_grad=True),
        torch.randn(4, 144, 160, requires_grad=True),
        torch.randn(50, 144) * 1e-5,
    )


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_dense_product_and_its_gradients_follow_the_formulas(recipe: Recipe) -> None:
    x, weight, gradient = dense_operands()
    y = DenseProduct(Emulated(recipe))(x, weight)
    y.backward(gradient)
    flat_x, flat_g = x.detach().flatten(0, 1), gradient.flatten(0, 1)
    assert y.shape == (4, 10, 160)
    assert_close(y.flatten(0, 1), reread(flat_x, recipe.input) @ reread(weight, recipe.weight).T)
    assert_close(x.grad.flatten(0, 1), reread(flat_g, recipe.gradient) @ reread(weight, recipe.weight_in_gradient))
    assert_close(weight.grad, flat_g.double().T @ flat_x.double())


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_grouped_product_is_each_experts_own_and_ignores_rows_past_the_last_offset(recipe: Recipe) -> None:
    rows, weight, gradient = grouped_operands()
    product = Fp8GroupedProduct(Emulated(recipe))
    with torch.no_grad():
        rows[45:] = math.inf  # as uninitialised memory may hold
    gradient[45:] = math.nan
    y = product(rows, weight, OFFSETS)
    y.backward(gradient)
    start = 0
    for expert, end in enumerate(OFFSETS.tolist()):
        own, start = slice(start, end), end
        g, x = gradient[own], rows.detach()[own]
        if len(x):
            assert_close(y[own], reread(x, recipe.input) @ reread(weight[expert], recipe.weight).T)
            assert_close(rows.grad[own], reread(g, recipe.gradient) @ reread(weight[expert], recipe.weight_in_gradient))
            assert_close(weight.grad[expert], g.double().T @ x.double())
        else:
            assert (weight.grad[expert] == 0).all()


def test_a_rank_without_rows_multiplies_nothing_and_has_gradients_of_zero() -> None:
    for recipe in RECIPES.values():
        rows, weight = torch.empty(0, 160, requires_grad=True), torch.randn(4, 144, 160, requires_grad=True)
        y = Fp8GroupedProduct(Emulated(recipe))(rows, weight, torch.zeros(4, dtype=torch.int32))
        y.sum().backward()
        assert y.shape == (0, 144)
        assert (weight.grad == 0).all()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_three_mantissa_bits(recipe: Recipe, dtype: torch.dtype) -> None:
    x, weight, gradient = (operand.detach().to(dtype) for operand in dense_operands())
    kernels = Emulated(recipe)

    def error(got: Tensor, expected: Tensor) -> float:
        return float((got.double() - expected).norm() / expected.norm())

    flat_x, flat_g = x.flatten(0, 1), gradient.flatten(0, 1)
    # Two operands, each off by up to 2^-4, uniform on a logarithmic scale: some 2.6% root mean square together.
    assert 0.015 < error(kernels.product(flat_x, weight), flat_x.double() @ weight.double().T) < 0.045
    assert 0.015 < error(kernels.input_gradient(flat_g, weight), flat_g.double() @ weight.double()) < 0.045


def test_row_wise_is_torchaos_recipe_to_the_bit() -> None:
    """Its Float8Linear, emulated: output and both gradients; and the kernels that GPUs run, told to emulate."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    from model.fp8.gpu_kernels import RowwiseKernels

    config = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    object.__setattr__(config, "emulate", True)
    x, weight, gradient = dense_operands()
    theirs = Float8Linear(288, 160, bias=False, config=config)
    theirs.weight.data.copy_(weight.detach())
    their_x = x.detach().clone().requires_grad_()
    their_y = theirs(their_x)
    their_y.backward(gradient)
    for kernels in (Emulated(ROWWISE), RowwiseKernels(emulate=True)):
        x.grad = weight.grad = None
        y = DenseProduct(kernels)(x, weight)
        y.backward(gradient)
        assert torch.equal(y, their_y)
        assert torch.equal(x.grad, their_x.grad)
        torch.testing.assert_close(weight.grad, theirs.weight.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_reaches_output_and_gradients(recipe: Recipe, poison: float) -> None:
    x, weight, gradient = dense_operands()
    product = DenseProduct(Emulated(recipe))
    with torch.no_grad():
        x[0, 3, 7] = poison
    gradient[1, 2, 5] = poison
    y = product(x, weight)
    y.backward(gradient)
    assert y[0, 3].isnan().all()
    assert y[1:].isfinite().all()
    assert x.grad[1, 2].isnan().all()
    assert not weight.grad[:, 7].isfinite().any()
    with torch.no_grad():
        x[0, 3, 7] = 0
        weight[4, 9] = poison
    assert product(x, weight)[..., 4].isnan().all()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_only_the_input_and_the_parameter_itself_are_saved(recipe: Recipe) -> None:
    saved: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    kernels = Emulated(recipe)
    x, weight, _ = dense_operands()
    rows, experts, _ = grouped_operands()
    weight, experts = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(experts.detach())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        DenseProduct(kernels)(x, weight)
        Fp8GroupedProduct(kernels)(rows, experts, OFFSETS)
    assert {id(tensor) for tensor in saved} == {id(x), id(weight), id(rows), id(experts), id(OFFSETS)}


def test_a_scale_spans_no_two_tokens_so_a_tokens_product_is_its_own() -> None:
    for recipe in (ROWWISE, BLOCKWISE):
        kernels = Emulated(recipe)
        x, weight, _ = (operand.detach() for operand in dense_operands())
        x = x.flatten(0, 1)
        alone = kernels.product(x[:1], weight)
        x[1:] *= 1e6
        torch.testing.assert_close(kernels.product(x, weight)[:1], alone, rtol=1e-5, atol=1e-5 * alone.abs().max())
