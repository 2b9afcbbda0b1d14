"""When the numbers go wrong: steps that are skipped, losses that jump, samples that are passed over.

Three things can happen to a step, and every rank decides them from the same reduced numbers:

- **Skipped.** The loss or the gradients of some rank are not finite. The engine drops the step on all ranks together
  (``TrainingEngine.step``): weights, optimizer and router biases stay; the step number and the samples go on.
- **High.** The robust z-score of its loss exceeds ``spike_threshold``::

      z = (loss - median) / max(1.4826 MAD, 0.01 nats)        MAD = median |x - median| of the last calm losses

  1.4826 MAD is the standard deviation of a normal distribution, and neither number is moved by the outliers that are
  looked for (Rousseeuw and Croux, 1993). High losses never enter the window, or a long spike would become normal.
- **Calm.** Everything else.

Bad steps (skipped or high) in a row make a streak. ``spike_steps`` high ones, or ``max_skips_in_row`` skipped ones, are
*trouble*: the run goes back to the newest checkpoint from before the streak (and before ``rollback_margin_steps`` more:
the update that did the harm came before the loss that shows it), and passes over the samples from there to here, as
PaLM did by hand (Chowdhery et al., 2022, section 5.1). Otherwise the replayed steps are the same to the bit.

No detection before the schedule's warm-up, a full window, and the first scheduled checkpoint: until then there may be
nothing to go back to. The window starts again at each stage of a curriculum, whose losses are of another level.

What the guard knows travels in every checkpoint, so a run that was killed anywhere decides as an unbroken one: killed
between a spike and its roll-back, it sees the same losses again and rolls back again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from pretrain.config import StabilitySection, TrainingConfig

SMALLEST_DEVIATION = 0.01
"""Nats. Losses that hardly vary (a memorised set, a test) would make any change a spike."""
NORMAL_CONSISTENCY = 1.4826


def robust_z_score(loss: float, recent: Iterable[float]) -> float:
    """How many robust standard deviations ``loss`` lies above the median of ``recent`` (not empty)."""
    values = list(recent)
    middle = median(values)
    deviation = NORMAL_CONSISTENCY * median(abs(value - middle) for value in values)
    return (loss - middle) / max(deviation, SMALLEST_DEVIATION)


@dataclass(frozen=True)
class Trouble:
    """A streak that calls for a roll-back."""

    reason: str
    newest_step: int  # a checkpoint of this step or an earlier one is from before the trouble
    skip_from: int  # samples [skip_from, skip_to) are passed over afterwards
    skip_to: int


@dataclass
class _Memory:
    """What a checkpoint keeps; plain JSON values."""

    window: list[float] = field(default_factory=list)
    stage: int = 0  # first token of the stage that the window belongs to
    recent: list[list[int]] = field(default_factory=list)  # [step, first sample] of the last calm ones, oldest first
    streak_step: int | None = None  # the streak's first step, or no streak
    streak_sample: int = 0
    streak_high: int = 0
    streak_skipped: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    evaluation_due: bool = False
    skipped_samples: list[list[int]] = field(default_factory=list)


class StabilityGuard:
    """Judges each step, and knows which samples are passed over. No collectives: all ranks are told the same."""

    def __init__(self, config: TrainingConfig, remembered: dict[str, Any]) -> None:
        """``remembered`` is what :meth:`memory` gave, or empty in a new run."""
        self.section: StabilitySection = config.stability
        self.batch_size = config.data.global_batch_size
        self._memory = _Memory(**remembered)
        self._first_judged = 1 + max(
            config.schedule.warmup_steps
            if self.section.spike_warmup_steps is None
            else self.section.spike_warmup_steps,
            config.checkpoint.every + self.section.rollback_margin_steps,
        )

    @property
    def skipped_steps(self) -> int:
        """Steps dropped for numbers that were not finite, in the history of the present weights."""
        return self._memory.skipped_steps

    @property
    def rollbacks(self) -> int:
        """Times the run went back to a checkpoint."""
        return self._memory.rollbacks

    @property
    def evaluation_due(self) -> bool:
        """Whether the last step still wants its evaluation: the run was asked to stop before or during it."""
        return self._memory.evaluation_due

    @evaluation_due.setter
    def evaluation_due(self, due: bool) -> None:
        self._memory.evaluation_due = due

    def memory(self) -> dict[str, Any]:
        """What a checkpoint must keep: JSON values, copied."""
        values = vars(self._memory)
        return {name: list(value) if isinstance(value, list) else value for name, value in values.items()}

    def _passed_over(self) -> list[tuple[int, int]]:
        """Disjoint rising ranges of samples, of whole steps: a step that touches a forbidden sample is left out."""
        ranges: list[tuple[int, int]] = []
        size = self.batch_size
        for first, end in sorted([*self.section.skip_samples, *map(tuple, self._memory.skipped_samples)]):
            first, end = first // size * size, -(-end // size) * size
            if ranges and first <= ranges[-1][1]:
                before = ranges.pop()
                first, end = before[0], max(end, before[1])
            ranges.append((first, end))
        return ranges

    def next_sample(self, sample: int) -> int:
        """The first sample of the next step, ``sample`` being where the last one ended."""
        for first, end in self._passed_over():
            if first <= sample < end:
                return end
        return sample

    def end_of(self, sample: int, steps: int) -> int:
        """Where ``steps`` more steps from ``sample`` on end: what the run needs of its data."""
        end = sample + steps * self.batch_size
        for first, after in self._passed_over():
            if after > sample and first < end:
                end += after - max(first, sample)
        return end

    def observe(self, step: int, first_sample: int, stage: int, loss: float, skipped: bool) -> Trouble | None:
        """Judge the step that began with ``first_sample``, in the stage of the curriculum from token ``stage`` on.

        ``loss`` is the mean over all ranks in nats; it is not looked at when the step was ``skipped``.
        """
        memory, section = self._memory, self.section
        if stage != memory.stage:
            memory.stage, memory.window = stage, []
        if skipped:
            memory.skipped_steps += 1
        if not skipped and not self._is_high(step, loss):
            memory.window = [*memory.window, loss][-section.spike_window :]
            self._be_calm(step, first_sample)
            return None
        if memory.streak_step is None:
            memory.streak_step, memory.streak_sample = step, first_sample
        memory.streak_skipped += skipped
        memory.streak_high += not skipped
        if memory.streak_high >= section.spike_steps:
            reason = f"loss {loss:.4f} is a spike, {memory.streak_high} steps high since step {memory.streak_step}"
        elif memory.streak_skipped >= section.max_skips_in_row:
            reason = f"{memory.streak_skipped} steps skipped since step {memory.streak_step}, none calm between"
        else:
            return None
        first_left_out, skip_from = (memory.recent or [[memory.streak_step, memory.streak_sample]])[0]
        return Trouble(reason, first_left_out - 1, skip_from, first_sample + self.batch_size)

    def _is_high(self, step: int, loss: float) -> bool:
        memory, section = self._memory, self.section
        if section.spike_threshold is None or len(memory.window) < section.spike_window or step < self._first_judged:
            return False
        return robust_z_score(loss, memory.window) > section.spike_threshold

    def _be_calm(self, step: int, first_sample: int) -> None:
        memory = self._memory
        if margin := self.section.rollback_margin_steps:
            memory.recent = [*memory.recent, [step, first_sample]][-margin:]
        memory.streak_step, memory.streak_sample, memory.streak_high, memory.streak_skipped = None, 0, 0, 0

    def roll_back(self, trouble: Trouble, remembered: dict[str, Any]) -> None:
        """Take over what the checkpoint remembers, but for what was learnt since: how often, and which samples."""
        ranges = [*self._memory.skipped_samples, [trouble.skip_from, trouble.skip_to]]
        rollbacks = self._memory.rollbacks + 1
        self._memory = _Memory(**{**remembered, "rollbacks": rollbacks, "skipped_samples": ranges})
