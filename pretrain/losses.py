"""What training minimises, from the model's outputs. Sums and logarithms are in fp32 whatever the model's dtype."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

from pretrain.config import TrainingConfig

IGNORED_TARGET = -100


def language_model_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token; targets of ``IGNORED_TARGET`` do not count."""
    return functional.cross_entropy(logits_BSV.float().flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORED_TARGET)


def training_loss(language_model_loss: Tensor, ponder_cost: Tensor, config: TrainingConfig) -> Tensor:
    """What is differentiated: the language-model loss, and with ACT ``loop.ponder_weight`` times the ponder cost."""
    if not config.model.act:
        return language_model_loss
    return language_model_loss + config.loop.ponder_weight * ponder_cost


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross-entropy in nats of each position, (B, S) fp32; 0 where the target is ignored."""
    losses = functional.cross_entropy(
        logits_BSV.float().flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORED_TARGET, reduction="none"
    )
    return losses.view_as(targets_BS)
