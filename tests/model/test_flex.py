"""Attention by blocks: the same numbers as by a mask written out, in every attention, forward and backward.

``flex_attention`` refuses gradients on CPUs, although its uncompiled form has them in plain torch; here it is allowed.
"""

from __future__ import annotations

import pytest
import torch
from amplified import amplified
from torch.nn.attention import flex_attention as torch_flex

from model import IceConfig
from model.attention.causal import Memory, attention_mask, causal_attention
from model.attention.flex import BLOCK, _blocks_seen, block_mask, probe, windowed_attention_and_lse
from model.expert_parallel import set_expert_product
from model.grouped_product import loop

STRUCTURES = {
    "gqa": IceConfig(recurrent_layers=2, qk_norm=True),
    "gqa_window": IceConfig(sliding_window=8, full_attention_every=2),
    "mla_window": IceConfig(attn_type="mla", sliding_window=8),
    "moda": IceConfig(attn_type="moda_v2", moda_history_window=2),
    "moda_window": IceConfig(attn_type="moda_v2", moda_history_window=2, sliding_window=8),
    "gated_gqa": IceConfig(kv_policy="gated"),
    "gated_mla": IceConfig(kv_policy="gated", attn_type="mla"),
}


@pytest.fixture
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def seen_pairs(length: int, window: int | None, documents_BS: torch.Tensor | None) -> torch.Tensor:
    """The definition, (B or 1, 1, S, S) bool."""
    mask = attention_mask(length, Memory((torch.zeros(1, 1, length, 1),)), window, document_ids_BS=documents_BS)
    if mask is None:
        return torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return (mask == 0).view(-1, 1, length, length)


def some_documents(length: int, ordered: bool) -> torch.Tensor:
    ids = torch.randint(0, max(length // 60, 2), (2, length))
    return ids.sort(dim=1).values if ordered else ids.repeat_interleave(40, dim=1)[:, :length]


@pytest.mark.parametrize("documents", ["none", "ordered", "any"])
@pytest.mark.parametrize("window", [None, 1, 50, 128, 300])
@pytest.mark.parametrize("length", [1, 127, 128, 390, 700])
def test_no_seen_pair_lies_in_an_empty_block_and_no_hidden_one_in_a_full_block(
    length: int, window: int | None, documents: str
) -> None:
    torch.manual_seed(length)
    documents_BS = None if documents == "none" else some_documents(length, documents == "ordered")
    some, full = _blocks_seen(length, torch.device("cpu"), window, documents_BS)
    seen = seen_pairs(length, window, documents_BS)
    padded = torch.nn.functional.pad(seen, (0, -length % BLOCK, 0, -length % BLOCK))
    pairs = padded.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4).flatten(-2)
    assert not (pairs.any(-1) & ~some).any()
    assert not (full & ~pairs.all(-1)).any()
    if documents != "any":  # then nothing is computed in vain either
        assert torch.equal(some.expand_as(pairs[..., 0]), pairs.any(-1))
        assert torch.equal(full.expand_as(pairs[..., 0]), pairs.all(-1))
    blocks = block_mask(length, torch.device("cpu"), window, documents_BS)
    assert torch.equal(blocks.to_dense().bool(), some)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("length", [100, 300])
def test_attention_and_its_logsumexp_equal_the_written_out(
    gradients_on_cpu: None, length: int, window: int | None
) -> None:
    torch.manual_seed(0)
    documents_BS = some_documents(length, ordered=True)
    q, k = (torch.randn(2, heads, length, 24, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    v = torch.randn(2, 2, length, 16, dtype=torch.float64, requires_grad=True)
    blocks = block_mask(length, q.device, window, documents_BS)
    seen = seen_pairs(length, window, documents_BS)
    scores = 0.2 * q @ k.repeat_interleave(2, dim=1).transpose(-2, -1)
    scores = scores.masked_fill(~seen, float("-inf"))
    expected = scores.softmax(-1) @ v.repeat_interleave(2, dim=1), scores.logsumexp(-1)
    found = windowed_attention_and_lse(q, k, v, 0.2, blocks)
    factors = [torch.randn_like(x) for x in expected]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(causal_attention(q, k, v, 0.2, blocks), expected[0])
    gradients = [
        torch.autograd.grad(sum((x * f).sum() for x, f in zip(outcome, factors, strict=True)), (q, k, v))
        for outcome in (found, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("remat", ["none", "loop"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_attention_is_the_same_model_by_blocks(gradients_on_cpu: None, structure: str, remat: str) -> None:
    torch.manual_seed(5)
    config = STRUCTURES[structure].scaled_down()
    model = amplified(config, logits=True).double()
    set_expert_product(model, loop)  # the grouped kernel knows no float64
    model.set_remat(remat)
    ids = torch.randint(0, config.vocab_size, (2, 40))
    documents_BS = torch.tensor([[0] * 21 + [1] * 19, [3] * 5 + [1] * 35])
    parameters = list(model.parameters())
    outcomes = []
    for kernel in ("sdpa", "flex"):
        model.set_attention_kernel(kernel)
        logits = model(ids, 3, document_ids=documents_BS)
        gradients = torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)
        outcomes.append((logits, [gradient for gradient in gradients if gradient is not None]))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-7, atol=1e-9)


def test_a_layer_asks_for_blocks_only_where_only_a_window_or_documents_hide_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int | None, bool]] = []

    def spy(length: int, device: torch.device, window: int | None, documents: torch.Tensor | None) -> object:
        asked.append((length, window, documents is not None))
        return block_mask(length, device, window, documents)

    monkeypatch.setattr("model.attention.flex.block_mask", spy)
    config = IceConfig(sliding_window=8, full_attention_every=2).scaled_down()
    model = amplified(config).eval()
    model.set_attention_kernel("flex")
    ids = torch.randint(0, config.vocab_size, (2, 20))
    with torch.no_grad():
        model(ids, 2)
        assert set(asked) == {(20, 8, False)}
        asked.clear()
        model(ids[:, :8], 2)  # no longer than the window
        model(ids, 2, padding=torch.tensor([0, 3]))
        model.generate(ids[:, :12], max_new_tokens=2, n_loops=2)
        assert not asked
        model(ids, 2, document_ids=torch.arange(20).expand(2, -1) // 10)
        assert set(asked) == {(20, 8, True), (20, None, True)}


def test_new_documents_of_the_same_shape_compile_nothing_anew() -> None:
    """Each step makes a mask with a condition of its own; torch must see that only tensors differ."""
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    attend = torch.compile(torch_flex.flex_attention, backend=counter, fullgraph=True)
    q = torch.randn(2, 2, 200, 16)
    for _ in range(3):
        documents_BS = some_documents(200, ordered=True)
        out = attend(q, q, q, block_mask=block_mask(200, q.device, 70, documents_BS))
        seen = seen_pairs(200, 70, documents_BS)
        expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_cpu_is_told_why_not() -> None:
    assert probe(torch.device("cpu"), torch.float32, 16, 16) == "no kernels for both directions on cpu"
