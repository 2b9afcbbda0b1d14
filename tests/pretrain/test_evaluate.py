"""Bits per byte, against a calculation by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.data import Batch
from pretrain.evaluate import Tally, default_depths
from pretrain.losses import IGNORED_TARGET


def batch_with_uniform_logits(vocabulary: int) -> tuple[Batch, torch.Tensor]:
    targets = torch.tensor([[0, 1, 2, IGNORED_TARGET], [2, 2, 1, 0]])
    domains = torch.tensor([[0, 0, 1, -1], [1, 1, 0, 0]])
    return Batch(targets.clamp_min(0), targets, (0, 1), domains), torch.zeros(2, 4, vocabulary)


def test_bits_per_byte_of_a_uniform_model_is_tokens_times_log_vocabulary_over_bytes() -> None:
    token_bytes = torch.tensor([0, 3, 5])  # id 0 is an end token and stands for no text
    tally = Tally(["prose", "technical"], token_bytes)
    batch, logits = batch_with_uniform_logits(3)
    tally.add(batch, logits)
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
    alone.add(batch, logits)
    halves = [
        (Batch(*(t[row : row + 1] for t in (batch.input_ids, batch.targets)), (row,), batch.domain_ids[row : row + 1]))  # type: ignore[index]
        for row in range(2)
    ]
    first.add(halves[0], logits[:1])
    second.add(halves[1], logits[1:])
    summed = [a + b for a, b in zip(first.values(), second.values(), strict=True)]
    assert first.result(summed).bits_per_byte == pytest.approx(alone.result().bits_per_byte, rel=1e-12)


def test_default_depths_are_one_two_t_and_twice_t() -> None:
    assert default_depths(4) == [1, 2, 4, 8]
    assert default_depths(1) == [1, 2]
