"""The learning rate against its closed forms."""

from __future__ import annotations

import math

import pytest

from pretrain.config import ScheduleSection
from pretrain.schedule import lr_scale


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    schedule = ScheduleSection(steps=100, warmup_steps=10)
    assert [lr_scale(schedule, step) for step in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_cosine_passes_its_midpoint_and_ends_at_the_floor() -> None:
    schedule = ScheduleSection(kind="cosine", steps=110, warmup_steps=10, min_lr_ratio=0.2)
    assert lr_scale(schedule, 60) == pytest.approx(0.6)
    assert lr_scale(schedule, 110) == pytest.approx(0.2)
    assert lr_scale(schedule, 35) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


def test_warmup_stable_decay_is_flat_then_falls_with_the_square_root() -> None:
    schedule = ScheduleSection(kind="warmup_stable_decay", steps=100, warmup_steps=10, decay_steps=25, min_lr_ratio=0.0)
    assert {lr_scale(schedule, step) for step in range(10, 76)} == {1.0}
    assert lr_scale(schedule, 91) == pytest.approx(1 - math.sqrt(16 / 25))
    assert lr_scale(schedule, 100) == pytest.approx(0.0)


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    schedule = ScheduleSection(kind="constant", steps=50, warmup_steps=5)
    assert {lr_scale(schedule, step) for step in range(5, 51)} == {1.0}
    assert lr_scale(schedule, 1) == pytest.approx(0.2)


def test_no_warm_up_starts_at_the_peak_or_below() -> None:
    schedule = ScheduleSection(kind="cosine", steps=50, warmup_steps=0)
    assert 0.99 < lr_scale(schedule, 1) <= 1.0
