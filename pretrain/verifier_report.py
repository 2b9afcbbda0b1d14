"""What an Apex model's scores are worth: accuracy, mean score, Brier score and calibration error, step by step.

Half of the held-out tokens (every second one) fit the calibration, the other half is what all numbers are of. A
verifier that always says 1 shows here: its Brier score is the error rate, and its calibration error too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model import IceModel
from model.calibration import brier_score, expected_calibration_error, fit_calibration
from model.token_loss import IGNORED_TARGET
from model.verifier import CORRECT
from pretrain.data import Batch


@dataclass(frozen=True)
class StepReport:
    """One step's scores against what was right; ``scale`` and ``shift`` are the fitted calibration."""

    step: int
    tokens: int
    accuracy: float
    mean_score: float
    brier: float
    ece: float
    calibrated_brier: float
    calibrated_ece: float
    scale: float
    shift: float


@torch.no_grad()
def report_verifier(model: IceModel, batches: Sequence[Batch], n_loops: int) -> list[StepReport]:
    """The reports of steps 1 to ``n_loops`` on held-out ``batches``; ``model`` in evaluation mode."""
    logits: list[list[torch.Tensor]] = [[] for _ in range(n_loops)]
    correct: list[list[torch.Tensor]] = [[] for _ in range(n_loops)]
    for batch in batches:
        counted_BS = batch.targets != IGNORED_TARGET
        output = model(
            batch.input_ids,
            n_loops,
            read_loops=tuple(range(1, n_loops + 1)),
            document_ids=batch.document_ids,
            return_output=True,
        )
        assert output.refinement is not None
        assert output.read_logits_NBSV is not None
        for step in range(n_loops):
            logits[step].append(output.refinement.judged_TBS2[step, ..., CORRECT][counted_BS])
            correct[step].append((output.read_logits_NBSV[step].argmax(-1) == batch.targets)[counted_BS])
    return [
        _report(step + 1, torch.cat(of_step), torch.cat(right))
        for step, (of_step, right) in enumerate(zip(logits, correct, strict=True))
    ]


def _report(step: int, logits_N: torch.Tensor, correct_N: torch.Tensor) -> StepReport:
    calibration = fit_calibration(logits_N[::2], correct_N[::2])
    judged_N, right_N = logits_N[1::2], correct_N[1::2]
    stated_N, mended_N = judged_N.sigmoid(), calibration.apply(judged_N)
    return StepReport(
        step,
        len(judged_N),
        right_N.double().mean().item(),
        stated_N.mean().item(),
        brier_score(stated_N, right_N),
        expected_calibration_error(stated_N, right_N),
        brier_score(mended_N, right_N),
        expected_calibration_error(mended_N, right_N),
        *calibration,
    )
