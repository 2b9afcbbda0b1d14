"""Bits per byte, against a calculation by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from model.token_loss import IGNORED_TARGET, token_losses
from pretrain.data import Batch, HeldOut
from pretrain.evaluate import Tally, combine, default_depths


def batch_with_uniform_logits(vocabulary: int) -> tuple[Batch, torch.Tensor]:
    targets = torch.tensor([[0, 1, 2, IGNORED_TARGET], [2, 2, 1, 0]])
    domains = torch.tensor([[0, 0, 1, -1], [1, 1, 0, 0]])
    return Batch(targets.clamp_min(0), targets, (0, 1), domains), torch.zeros(2, 4, vocabulary)


def test_bits_per_byte_of_a_uniform_model_is_tokens_times_log_vocabulary_over_bytes() -> None:
    token_bytes = torch.tensor([0, 3, 5])  # id 0 is an end token and stands for no text
    tally = Tally(["prose", "technical"], token_bytes)
    batch, logits = batch_with_uniform_logits(3)
    tally.add(batch, token_losses(logits, batch.targets))
    result = tally.result()
    assert (result.tokens, result.text_bytes) == (7, 3 + 5 + 5 + 5 + 3)
    assert result.nats_per_token == pytest.approx(math.log(3))
    assert result.bits_per_byte == pytest.approx(7 * math.log2(3) / 21)
    assert result.bits_per_byte_by_domain["prose"] == pytest.approx(4 * math.log2(3) / 6)
    assert result.bits_per_byte_by_domain["technical"] == pytest.approx(3 * math.log2(3) / 15)


def test_sums_of_two_ranks_give_the_result_of_one() -> None:
    token_bytes = torch.tensor([0, 3, 5])
    batch, logits = batch_with_uniform_logits(3)
    alone, first, second = (Tally(["prose", "technical"], token_bytes) for _ in range(3))
    logits = logits + torch.randn(2, 4, 3)
    losses = token_losses(logits, batch.targets)
    alone.add(batch, losses)
    halves = [
        (Batch(*(t[row : row + 1] for t in (batch.input_ids, batch.targets)), (row,), batch.domain_ids[row : row + 1]))  # type: ignore[index]
        for row in range(2)
    ]
    first.add(halves[0], losses[:1])
    second.add(halves[1], losses[1:])
    summed = [a + b for a, b in zip(first.values(), second.values(), strict=True)]
    assert first.result(summed).bits_per_byte == pytest.approx(alone.result().bits_per_byte, rel=1e-12)


def test_sources_are_judged_by_their_domains_and_data_sets_by_their_own() -> None:
    token_bytes = torch.tensor([0, 3, 5])
    batch, logits = batch_with_uniform_logits(3)
    main, other = (Tally(["prose", "technical"], token_bytes) for _ in range(2))
    main.add(batch, token_losses(logits, batch.targets))
    other.add(batch, token_losses(logits + torch.tensor([0.0, 1.0, 2.0]), batch.targets))
    dataset: Any = None
    held_out = [
        HeldOut(dataset, 4, {"easy": ("prose",), "dull": ("technical",)}),
        HeldOut(dataset, 4, {"new": None, "absent": ("verse",)}),
    ]
    result = combine(held_out, [main, other])
    assert (result.bits_per_byte, result.tokens) == (main.result().bits_per_byte, 7)
    assert list(result.by_source) == ["easy", "dull", "new"]
    assert result.by_source["easy"].bits_per_byte == result.bits_per_byte_by_domain["prose"]
    assert result.by_source["easy"].bits_per_byte_by_domain.keys() == {"prose"}
    assert result.by_source["easy"].tokens + result.by_source["dull"].tokens == 7
    assert result.by_source["new"] == other.result()
    # As over two ranks that saw the same: twice the sums, the same means.
    doubled = combine(held_out, [main, other], [2 * value for value in (*main.values(), *other.values())])
    assert doubled.by_source["new"].bits_per_byte == pytest.approx(other.result().bits_per_byte)
    assert doubled.tokens == 14


def test_one_data_set_has_no_sources_to_tell_apart() -> None:
    dataset: Any = None
    tally = Tally(["prose", "technical"], torch.tensor([0, 3, 5]))
    batch, logits = batch_with_uniform_logits(3)
    tally.add(batch, token_losses(logits, batch.targets))
    assert combine([HeldOut(dataset, 4, {"data": None})], [tally]).by_source == {}
    assert list(combine([HeldOut(dataset, 4, {"data": ("prose",)})], [tally]).by_source) == ["data"]


def test_default_depths_are_one_two_t_and_twice_t() -> None:
    assert default_depths(4) == [1, 2, 4, 8]
    assert default_depths(1) == [1, 2]
