"""Losses against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from pretrain.losses import IGNORED_TARGET, language_model_loss, token_losses


def reference(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.double()
    log_partition = logits.exp().sum(dim=-1).log()
    chosen = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (log_partition - chosen) * (targets != IGNORED_TARGET)


def test_losses_match_the_formula_and_ignored_targets_do_not_count() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11)
    targets = torch.randint(0, 11, (3, 5))
    targets[0, 2] = targets[2] = IGNORED_TARGET
    expected = reference(logits, targets)
    torch.testing.assert_close(token_losses(logits, targets).double(), expected, rtol=1e-6, atol=1e-6)
    assert language_model_loss(logits, targets).item() == pytest.approx((expected.sum() / 9).item(), rel=1e-6)


def test_losses_of_bf16_logits_are_summed_in_fp32() -> None:
    logits = torch.full((1, 1, 4096), 0.5, dtype=torch.bfloat16)
    loss = language_model_loss(logits, torch.zeros(1, 1, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(8.317766, rel=1e-5)  # ln 4096
