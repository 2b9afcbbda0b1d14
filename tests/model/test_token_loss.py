"""Losses made chunk by chunk, against float64 and against whole logits; and what they hold in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import IceConfig, IceModel
from model.token_loss import IGNORED_TARGET, chunked_token_losses, token_losses


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, 12).to(dtype), torch.randn(29, 12).to(dtype)
    targets = torch.randint(0, 29, (2, 7))
    targets[0, 3] = targets[1, 6] = IGNORED_TARGET
    return x.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("chunk", [1, 3, 14, 100])
def test_chunked_losses_and_gradients_are_those_of_whole_logits_in_float64(chunk: int) -> None:
    x, weight, targets = inputs()
    share = torch.rand(2, 7)  # every token weighs differently
    losses = chunked_token_losses(x, weight, targets, chunk)
    (losses * share).sum().backward()
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = (x64 @ weight64.T).log_softmax(-1)
    expected = -log_p.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (targets != IGNORED_TARGET)
    (expected * share).sum().backward()
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    for found, wanted in ((x.grad, x64.grad), (weight.grad, weight64.grad)):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert losses[targets == IGNORED_TARGET].tolist() == [0.0, 0.0]
    assert x.grad is not None
    assert not x.grad[targets == IGNORED_TARGET].any()


def test_many_chunks_in_bf16_add_up_the_heads_gradient_in_fp32() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 2048, 16).bfloat16(), torch.randn(32, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 32, (1, 2048))
    chunked_token_losses(x, weight, targets, 4).sum().backward()
    exact = weight.detach().double().requires_grad_()
    token_losses_64 = -(x.double() @ exact.T).log_softmax(-1).gather(-1, targets.unsqueeze(-1))
    token_losses_64.sum().backward()
    assert weight.grad is not None
    assert exact.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    # 512 chunks added up in bf16 would be off by 2 percent and more.
    error = (weight.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.006, error


def test_a_loss_that_is_not_a_number_stays_one_in_the_gradients() -> None:
    x, weight, targets = inputs()
    with torch.no_grad():
        x[0, 1, 0] = torch.nan
    losses = chunked_token_losses(x, weight, targets, 4)
    assert losses.isnan().sum() == 1
    losses.sum().backward()
    assert weight.grad is not None
    assert weight.grad.isnan().any()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("tokens", [64, 512])
def test_no_tensor_grows_with_tokens_times_vocabulary(tokens: int) -> None:
    vocabulary, width, chunk = 1000, 4, 16
    x = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    with LargestTensor() as largest:
        chunked_token_losses(x, weight, torch.randint(0, vocabulary, (1, tokens)), chunk).sum().backward()
    assert largest.elements == chunk * vocabulary


def test_a_model_gives_the_same_losses_and_gradients_chunked_or_whole() -> None:
    config = IceConfig(slu=True, tie_embeddings=True).scaled_down()
    torch.manual_seed(1)
    model = IceModel(config)
    ids = torch.randint(0, config.vocab_size, (2, 13))
    found = []
    for chunk in (None, 5):
        model.set_loss_chunk(chunk)
        model.zero_grad()
        output = model(ids[:, :-1], 3, targets=ids[:, 1:], read_loops=(1, 2), probe_loop=2, return_output=True)
        assert (output.logits is None) == (output.read_logits_NBSV is None) == (chunk is not None)
        assert output.read_losses_NBS is not None
        assert output.probe is not None
        (output.losses_BS.sum() + output.read_losses_NBS.square().sum()).backward()
        gradients = [p.grad for name, p in model.named_parameters() if "depth_heads" not in name]
        found.append((output.losses_BS, output.read_losses_NBS, output.probe.losses_NBS, *gradients))
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-3, atol=3e-5)
    torch.testing.assert_close(found[0][0], token_losses(model(ids[:, :-1], 3), ids[:, 1:]), rtol=0, atol=0)


def test_what_makes_no_sense_with_targets_is_refused() -> None:
    model = IceModel(IceConfig(slu=True).scaled_down())
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="probe_loop = 1: compares losses; give targets"):
        model(ids, 2, probe_loop=1, return_output=True)
    for options in ({}, {"return_output": True, "only_last": True}):
        with pytest.raises(ValueError, match="targets: losses of all tokens are in the output"):
            model(ids, 2, targets=ids, **options)
    with pytest.raises(ValueError, match="loss chunk = 0: must be at least 1 token"):
        model.set_loss_chunk(0)
