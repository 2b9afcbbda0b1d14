"""Apex from Python: the model by its own name, and the controller that runs it and shows every step.

    model = ApexModel()                                   # apex_small: dim 512, 4 shared layers, 3 steps
    result, scores, history = RefinementController(model).run(ids)

``result`` is the prompt with its continuation, each token given steps until its score is high enough. ``scores`` and
``history`` come from one forward of the result at full depth: what each step would have said, and how sure it was.

Shapes: B batch, S prompt, N new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from model.apex_core import ApexCore, ScoreSchedule
from model.calibration import Calibration
from model.config import IceConfig
from model.families import apex_small
from model.generation import Adaptive, GenerationOptions, Sampling, generate
from model.looped_lm import IceModel
from model.verifier import CORRECT


class ApexModel(IceModel):
    """An :class:`IceModel` with an Apex core; ``ApexModel(**fields)`` is ``apex_small`` with fields replaced.

    Raises:
        ValueError: For a configuration of another family, or fields beside a configuration.
    """

    def __init__(self, config: IceConfig | None = None, **fields: Any) -> None:
        if config is None:
            config = apex_small(**fields)
        elif fields:
            raise ValueError(f"{', '.join(fields)}: give a configuration or fields, not both")
        if config.core != "apex":
            raise ValueError(f"core = {config.core}: ApexModel needs core = apex")
        super().__init__(config)


class StepRecord(NamedTuple):
    """One step over all tokens of the result."""

    step: int  # from 1
    next_ids_BS: torch.Tensor  # int64: the most likely next id at each position, were the steps to end here
    scores_BS: torch.Tensor  # fp32: the verifier's probability that it is right
    residual: float  # mean over tokens of ||h_t - h_(t-1)|| / ||h_t||


class RefinementRun(NamedTuple):
    """What a controller's run gives."""

    result: torch.Tensor  # (B, S + N) int64, a row that has met a stop id repeating it
    scores: list[torch.Tensor]  # for each step the mean score, scalars fp32
    history: list[StepRecord]


class RefinementController:
    """Runs an Apex model with a number of steps that follows its own scores.

    Args:
        model: Any model with an Apex core.
        threshold: Score from which a token is given no further step.
        gain_threshold: Least probability that another step helps; 0 asks the score alone.
        calibration: Applied to the scores that are returned.

    Raises:
        ValueError: For a model of another family or a threshold that is no probability.
    """

    def __init__(
        self,
        model: IceModel,
        threshold: float = 0.9,
        gain_threshold: float = 0.0,
        calibration: Calibration = Calibration(),  # noqa: B008 (immutable)
    ) -> None:
        if not isinstance(model.core, ApexCore):
            raise ValueError(f"core = {model.config.core}: only core = apex has steps with scores")
        self.decoding = Adaptive(threshold, gain_threshold)
        self.model, self.calibration = model, calibration

    @torch.no_grad()
    def run(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> RefinementRun:
        """Continue ``input_ids``, (B, S) or (S,) int64, and show what every step said of every token."""
        ids_BS = input_ids if input_ids.ndim == 2 else input_ids.unsqueeze(0)
        sampling = Sampling(temperature, seed=seed)
        options = GenerationOptions(max_new_tokens, None, sampling, self.decoding, stop_token_ids)
        result = torch.cat((ids_BS, generate(self.model, ids_BS, options).new_ids_BN), dim=1)
        was_training = self.model.training
        self.model.eval()
        try:
            history = self._history(result)
        finally:
            self.model.train(was_training)
        return RefinementRun(result, [record.scores_BS.mean() for record in history], history)

    def _history(self, ids_BS: torch.Tensor) -> list[StepRecord]:
        steps = self.model.config.max_loop_iters
        output = self.model(ids_BS, steps, read_loops=tuple(range(1, steps + 1)), return_output=True)
        assert output.refinement is not None
        assert output.read_logits_NBSV is not None
        assert output.states_NBSD is not None
        scores_TBS = self.calibration.apply(output.refinement.judged_TBS2[..., CORRECT])
        states = output.states_NBSD.float()
        moved = [math.nan] + [
            float(((new - old).norm(dim=-1) / new.norm(dim=-1).clamp_min(1e-12)).mean())
            for old, new in pairwise(states[:steps])
        ]
        return [
            StepRecord(step + 1, output.read_logits_NBSV[step].argmax(-1), scores_TBS[step], moved[step])
            for step in range(steps)
        ]


__all__ = ["ApexModel", "RefinementController", "RefinementRun", "ScoreSchedule", "StepRecord"]
