r"""What training minimises, from the model's outputs. Sums and logarithms are in fp32 whatever the model's dtype.

    objective = LM + ponder_weight * ponder cost                                                 (ACT)
              + shallow_weight * L_t + margin_weight * M + contrastive_weight * C                (CDL)
              + depth_head_weight * H                                                            (SLU)
              + verification_weight * V + correctness_weight * K + consistency_weight * S        (Apex)

CDL, contrastive depth learning, reads the model at a sampled shallow depth t < T as well. With l_t and l_T the token
losses at the two depths and d = l_t / mean(l_t) a token's difficulty (no gradient)::

    L_t = mean(l_t)
    M   = mean(d * relu(margin + l_T - l_t))        l_t without a gradient: only a better deep state lowers M
    C   = InfoNCE over positions of a sequence: the shallow state of a position against the deep states of all, cosine
          similarity / temperature, and the other way round; both directions averaged

M asks depth to pay where the token is hard; C ties the two states of one position together, so that deeper thinking is
about the same token. SLU's heads learn ``1[l_t - l_(t+1) > benefit_margin]`` by binary cross-entropy, H, from inputs
without a gradient.

Apex, for a step t < T drawn for each training step, z and z' the verifier's logits of correctness and benefit, means
over counted tokens::

    V = mean over all steps of -log sigmoid(z)                           moves refinements, never the verifier
    K = (BCE(z_t, right_t) + BCE(z_(t+1), right_(t+1))) / 2 + BCE(z'_t, 1[l_t - l_(t+1) > benefit_margin])
    S = mean over steps of MSE(proposal, refinement) + MSE(review, refinement)

``right_t``: the most likely next token after step t was the right one. K alone moves the verifier
(``model/verifier.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from model.looped_lm import DepthProbe, LoopedOutput, StepProbe
from model.token_loss import IGNORED_TARGET
from model.verifier import CORRECT, GAIN, RefinementTrace
from pretrain.config import ContrastiveDepthSection, TrainingConfig


class Objective(NamedTuple):
    """What is differentiated, and what it is made of."""

    total: Tensor
    terms: dict[str, Tensor]  # detached scalars; "loss" is the language-model loss. The keys depend on config only


def training_objective(output: LoopedOutput, targets_BS: Tensor, config: TrainingConfig) -> Objective:
    """The loss of a micro-batch: the language model's, and that of every idea that is on."""
    loss = mean_loss(output.token_losses_BS, targets_BS)
    total, terms = loss, {"loss": loss, "loop_residual": output.loop_residual}
    if config.model.act:
        terms["ponder_cost"] = output.ponder_cost
        total = total + config.loop.ponder_weight * output.ponder_cost
    if config.model.aec:
        terms["expert_share"] = output.expert_share
    if config.loop.cdl is not None:
        contrast = contrastive_depth_terms(output, targets_BS, config.loop.cdl)
        terms.update(contrast)
        weights = config.loop.cdl
        total = total + weights.shallow_weight * contrast["shallow_loss"]
        total = total + weights.margin_weight * contrast["depth_margin"]
        total = total + weights.contrastive_weight * contrast["depth_contrast"]
    if output.probe is not None:
        terms["depth_head_loss"] = depth_head_loss(output.probe, targets_BS, config.loop.depth_benefit_margin)
        total = total + config.loop.depth_head_weight * terms["depth_head_loss"]
    if output.loops_used_BS is not None:
        terms["loops_used"] = _counted_mean(output.loops_used_BS.float(), targets_BS)
    if output.refinement is not None and output.step_probe is not None:
        apex = config.loop.apex
        refinement = refinement_terms(output.refinement, output.step_probe, targets_BS, apex.benefit_margin)
        terms.update(refinement)
        total = total + apex.verification_weight * refinement["verification_loss"]
        total = total + apex.correctness_weight * refinement["verifier_loss"]
        total = total + apex.consistency_weight * refinement["consistency_loss"]
    return Objective(total, {name: term.detach() for name, term in terms.items()})


def mean_loss(losses_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean in nats a token; targets of ``IGNORED_TARGET`` do not count. Without any other the mean is not a number."""
    return losses_BS.sum() / (targets_BS != IGNORED_TARGET).sum()


def contrastive_depth_terms(
    output: LoopedOutput, targets_BS: Tensor, section: ContrastiveDepthSection
) -> dict[str, Tensor]:
    """CDL's three terms, unweighted scalars, from an output with one shallow depth read."""
    assert output.read_losses_NBS is not None
    assert output.states_NBSD is not None
    counted_BS = (targets_BS != IGNORED_TARGET).float()
    n_counted = counted_BS.sum().clamp_min(1)
    shallow_BS, deep_BS = output.read_losses_NBS[0], output.token_losses_BS
    shallow_loss = shallow_BS.sum() / n_counted
    difficulty_BS = (shallow_BS / shallow_loss.clamp_min(1e-6)).detach()
    missed_BS = functional.relu(section.margin + deep_BS - shallow_BS.detach()) * counted_BS
    return {
        "shallow_loss": shallow_loss,
        "depth_margin": (difficulty_BS * missed_BS).sum() / n_counted,
        "depth_contrast": state_contrast(
            output.states_NBSD[0], output.states_NBSD[-1], section.temperature, section.positions
        ),
    }


def state_contrast(shallow_BSD: Tensor, deep_BSD: Tensor, temperature: float, positions: int) -> Tensor:
    """InfoNCE between two states of the same positions, mean over both directions; evenly spaced ``positions`` of S."""
    length = shallow_BSD.shape[1]
    chosen_P = torch.linspace(0, length - 1, min(positions, length), device=shallow_BSD.device).round().long()
    shallow_BPD = functional.normalize(shallow_BSD[:, chosen_P].float(), dim=-1)
    deep_BPD = functional.normalize(deep_BSD[:, chosen_P].float(), dim=-1)
    similarity_BPP = shallow_BPD @ deep_BPD.transpose(1, 2) / temperature
    same_BP = torch.arange(len(chosen_P), device=chosen_P.device).expand(len(shallow_BSD), -1)
    forward = functional.cross_entropy(similarity_BPP.transpose(1, 2), same_BP)
    backward = functional.cross_entropy(similarity_BPP, same_BP)
    return (forward + backward) / 2


def depth_head_loss(probe: DepthProbe, targets_BS: Tensor, margin: float) -> Tensor:
    """Binary cross-entropy of both depth heads against the measured benefit of one more loop."""
    before_BS, after_BS = probe.losses_NBS
    benefit_BS = (before_BS - after_BS > margin).float()
    counted_BS = (targets_BS != IGNORED_TARGET).float()
    losses_HBS = functional.binary_cross_entropy_with_logits(
        probe.benefit_logits_HBS.float(), benefit_BS.expand_as(probe.benefit_logits_HBS), reduction="none"
    )
    return (losses_HBS * counted_BS).sum() / (len(losses_HBS) * counted_BS.sum().clamp_min(1))


def refinement_terms(
    trace: RefinementTrace, probe: StepProbe, targets_BS: Tensor, benefit_margin: float
) -> dict[str, Tensor]:
    """Apex's three losses, unweighted scalars, and how the verifier did: mean score, mean accuracy, Brier score."""
    correct_NBS = probe.correct_NBS.float()
    judged_NBS = probe.judged_NBS2[..., CORRECT]
    correctness = functional.binary_cross_entropy_with_logits(judged_NBS, correct_NBS, reduction="none")
    benefit_BS = (probe.losses_NBS[0] - probe.losses_NBS[1] > benefit_margin).float()
    benefit = functional.binary_cross_entropy_with_logits(probe.judged_NBS2[0, ..., GAIN], benefit_BS, reduction="none")
    scores_NBS = judged_NBS.detach().sigmoid()
    by_token = {
        "verification_loss": functional.softplus(-trace.hoped_TBS).mean(dim=0),
        "verifier_loss": correctness.mean(dim=0) + benefit,
        "consistency_loss": trace.consistency_BS,
        "verifier_score": scores_NBS.mean(dim=0),
        "verifier_accuracy": correct_NBS.mean(dim=0),
        "verifier_brier": (scores_NBS - correct_NBS).square().mean(dim=0),
    }
    return {name: _counted_mean(values_BS, targets_BS) for name, values_BS in by_token.items()}


def _counted_mean(values_BS: Tensor, targets_BS: Tensor) -> Tensor:
    counted_BS = (targets_BS != IGNORED_TARGET).float()
    return (values_BS * counted_BS).sum() / counted_BS.sum().clamp_min(1)
