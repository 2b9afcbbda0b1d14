"""The learning rate as a pure function of the step: no state to save, nothing to restore.

With ``w`` warm-up steps, ``n`` steps in all, ``d`` decay steps and floor ``m`` (as shares of the peak)::

    warm-up              s / w                                        for s <= w, counting steps from 1
    cosine               m + (1 - m) * (1 + cos(pi * (s - w) / (n - w))) / 2
    warmup_stable_decay  1 until n - d, then 1 - (1 - m) * sqrt((s - (n - d)) / d)     (Hägele et al. 2024, 1-sqrt)
    constant             1
"""

from __future__ import annotations

import math

from pretrain.config import ScheduleSection


def lr_scale(schedule: ScheduleSection, step: int) -> float:
    """Share of ``optim.lr`` used by ``step`` (1 is the first, ``schedule.steps`` the last)."""
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    floor = schedule.min_lr_ratio
    if schedule.kind == "cosine":
        progress = min(1.0, (step - schedule.warmup_steps) / (schedule.steps - schedule.warmup_steps))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    decay_steps = schedule.decay_steps or max(1, schedule.steps // 5)
    into_decay = step - (schedule.steps - decay_steps)
    if into_decay <= 0:
        return 1.0
    return 1.0 - (1.0 - floor) * math.sqrt(min(1.0, into_decay / decay_steps))
