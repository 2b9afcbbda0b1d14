"""Losses against the formula in float64."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from model.looped_lm import DepthProbe, LoopedOutput
from model.token_loss import IGNORED_TARGET, token_losses
from pretrain.config import ContrastiveDepthSection, TrainingConfig
from pretrain.losses import (
    contrastive_depth_terms,
    depth_head_loss,
    mean_loss,
    state_contrast,
    training_objective,
)


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
    assert mean_loss(token_losses(logits, targets), targets).item() == pytest.approx(
        (expected.sum() / 9).item(), rel=1e-6
    )


def test_losses_of_bf16_logits_are_summed_in_fp32() -> None:
    logits = torch.full((1, 1, 4096), 0.5, dtype=torch.bfloat16)
    loss = token_losses(logits, torch.zeros(1, 1, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(8.317766, rel=1e-5)  # ln 4096


def contrast_output(batch: int = 2, length: int = 5) -> tuple[LoopedOutput, torch.Tensor]:
    torch.manual_seed(1)
    scalar = torch.zeros(())
    logits = torch.randn(batch, length, 11, requires_grad=True)
    states = torch.randn(2, batch, length, 6, requires_grad=True)
    read_logits = torch.randn(1, batch, length, 11, requires_grad=True)
    targets = torch.randint(0, 11, (batch, length))
    targets[0, 1] = IGNORED_TARGET
    output = LoopedOutput(
        logits=logits,
        ponder_cost=scalar,
        loop_residual=scalar,
        expert_share=scalar,
        states_NBSD=states,
        read_logits_NBSV=read_logits,
        losses_BS=token_losses(logits, targets),
        read_losses_NBS=token_losses(read_logits[0], targets).unsqueeze(0),
    )
    return output, targets


def test_contrastive_depth_terms_are_the_formulas() -> None:
    output, targets = contrast_output()
    section = ContrastiveDepthSection(margin=0.5, temperature=0.2)
    terms = contrastive_depth_terms(output, targets, section)
    assert output.read_logits_NBSV is not None
    assert output.states_NBSD is not None
    assert output.logits is not None
    shallow, deep = reference(output.read_logits_NBSV[0], targets), reference(output.logits, targets)
    counted = targets != IGNORED_TARGET
    mean_shallow = shallow[counted].mean()
    margin, contrast = 0.0, 0.0
    for b in range(2):
        for s in range(5):
            if counted[b, s]:
                margin += (
                    (shallow[b, s] / mean_shallow).item() * max(0.0, 0.5 + (deep[b, s] - shallow[b, s]).item()) / 9
                )
        first, last = output.states_NBSD[0, b].double(), output.states_NBSD[1, b].double()
        for i in range(5):
            to_deep = torch.stack([torch.cosine_similarity(first[i], last[j], dim=0) for j in range(5)]) / 0.2
            to_shallow = torch.stack([torch.cosine_similarity(last[i], first[j], dim=0) for j in range(5)]) / 0.2
            contrast += float(to_deep.logsumexp(0) - to_deep[i] + to_shallow.logsumexp(0) - to_shallow[i]) / 2 / 10
    assert terms["shallow_loss"].item() == pytest.approx(mean_shallow.item(), rel=1e-5)
    assert terms["depth_margin"].item() == pytest.approx(margin, rel=1e-5)
    assert terms["depth_contrast"].item() == pytest.approx(contrast, rel=1e-5)


def test_margin_is_lowered_by_a_better_deep_state_only() -> None:
    output, targets = contrast_output()
    contrastive_depth_terms(output, targets, ContrastiveDepthSection(margin=10.0))["depth_margin"].backward()
    assert output.logits is not None
    assert output.logits.grad is not None
    assert (output.logits.grad != 0).any()
    assert output.read_logits_NBSV is not None
    assert output.read_logits_NBSV.grad is None


def test_states_of_the_same_position_are_drawn_together() -> None:
    states = torch.eye(6).unsqueeze(0)
    aligned = state_contrast(states, states, 0.1, 128)
    assert aligned < 0.01 < state_contrast(states, states.roll(1, dims=1), 0.1, 128)
    # Only the evenly spaced positions count: 0 and 5 here.
    changed = states.clone()
    changed[:, 1:5] = states[:, [2, 3, 4, 1]]
    assert torch.equal(state_contrast(states, changed, 0.1, 2), state_contrast(states, states, 0.1, 2))


def test_depth_heads_learn_the_measured_benefit() -> None:
    torch.manual_seed(2)
    logits = torch.randn(2, 3, 4, 11)
    targets = torch.randint(0, 11, (3, 4))
    targets[1] = IGNORED_TARGET
    heads = torch.randn(2, 3, 4, requires_grad=True)
    before, after = reference(logits[0], targets), reference(logits[1], targets)
    total = 0.0
    for head in range(2):
        for b in (0, 2):
            for s in range(4):
                p = 1 / (1 + math.exp(-float(heads[head, b, s])))
                total -= math.log(p if before[b, s] - after[b, s] > 0.1 else 1 - p) / (2 * 8)
    losses = torch.stack([token_losses(one, targets) for one in logits])
    loss = depth_head_loss(DepthProbe(heads, losses), targets, 0.1)
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_objective_adds_the_weighted_terms_that_are_on() -> None:
    output, targets = contrast_output()
    output = output._replace(ponder_cost=torch.tensor(3.0))
    base = {"data": {"path": "x", "sequence_length": 4}, "model": {"max_seq_len": 64}}
    plain = training_objective(output, targets, TrainingConfig.model_validate(base))
    assert plain.total.item() == plain.terms["loss"].item() == mean_loss(output.losses_BS, targets).item()
    assert plain.terms.keys() == {"loss", "loop_residual"}
    weights = {"shallow_weight": 0.5, "margin_weight": 0.25, "contrastive_weight": 0.125}
    ideas = {"model": {"max_seq_len": 64, "act": True}, "loop": {"ponder_weight": 2.0, "cdl": weights}}
    full = training_objective(output, targets, TrainingConfig.model_validate(base | ideas))
    terms = full.terms
    expected = terms["loss"] + 2 * terms["ponder_cost"] + 0.5 * terms["shallow_loss"]
    expected = expected + 0.25 * terms["depth_margin"] + 0.125 * terms["depth_contrast"]
    assert full.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not any(term.requires_grad for term in terms.values())


def test_ideas_that_compare_two_depths_need_two_loops_in_every_step() -> None:
    base = {"data": {"path": "x"}}
    with pytest.raises(ValidationError, match=r"min_loops = 1: loop.cdl compares two depths"):
        TrainingConfig.model_validate(base | {"model": {}, "loop": {"cdl": {}, "distribution": "poisson"}})
    with pytest.raises(ValidationError, match=r"min_loops = 1: model.slu compares two depths"):
        TrainingConfig.model_validate(base | {"model": {"slu": True}, "loop": {"mean_loops": 1}})
