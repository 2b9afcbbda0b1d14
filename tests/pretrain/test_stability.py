"""The guard: what is a spike, what is passed over, and that a resume decides as an unbroken run."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.settings import BadInputError, parse_settings
from pretrain.config import TrainingConfig
from pretrain.stability import StabilityGuard, Trouble, robust_z_score

BATCH = 4


def config_with(**stability: Any) -> TrainingConfig:
    values = {
        "model": {"variant": "ice_tiny"},
        "data": {"path": "none", "global_batch_size": BATCH, "sequence_length": 16},
        "schedule": {"steps": 10_000, "warmup_steps": 10},
        "checkpoint": {"every": 10},
        "stability": {"spike_window": 8, "spike_steps": 2, "rollback_margin_steps": 2, **stability},
    }
    return parse_settings(TrainingConfig, values, "test")


def calm_loss(step: int) -> float:
    return 4.0 + 0.1 * math.sin(step)


def run(guard: StabilityGuard, losses: dict[int, float | None], first: int, last: int) -> tuple[int, Trouble | None]:
    """Steps ``first`` to ``last``, calm but for ``losses`` (None is a skipped step); stops at the first trouble."""
    for step in range(first, last + 1):
        loss = losses.get(step, calm_loss(step))
        trouble = guard.observe(step, (step - 1) * BATCH, 0, math.nan if loss is None else loss, loss is None)
        if trouble is not None:
            return step, trouble
    return last, None


@given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.floats(0, 20))
def test_the_z_score_is_the_formulas(losses: list[float], loss: float) -> None:
    middle = float(np.median(losses))
    deviation = max(1.4826 * float(np.median(np.abs(np.array(losses) - middle))), 0.01)
    assert robust_z_score(loss, losses) == pytest.approx((loss - middle) / deviation, rel=1e-9, abs=1e-9)


def test_on_normal_losses_the_z_score_counts_standard_deviations_and_outliers_move_it_little() -> None:
    generator = random.Random(0)
    losses = [generator.gauss(3.0, 0.2) for _ in range(4001)]
    assert robust_z_score(3.0 + 5 * 0.2, losses) == pytest.approx(5, rel=0.05)
    assert robust_z_score(3.0 + 5 * 0.2, [*losses, *[1e6] * 100]) == pytest.approx(5, rel=0.1)


def test_a_spike_names_the_checkpoint_from_before_it_and_the_samples_since() -> None:
    step, trouble = run(StabilityGuard(config_with(), {}), {30: 9.0, 31: 9.0}, 1, 100)
    assert (step, trouble is not None) == (31, True)
    assert trouble is not None
    # Two steps of margin: 28 and 29 are left out with 30 and 31.
    assert trouble.newest_step == 27
    assert (trouble.skip_from, trouble.skip_to) == (27 * BATCH, 31 * BATCH)
    assert "step 30" in trouble.reason


@pytest.mark.parametrize(
    ("losses", "changes"),
    [
        ({30: 9.0}, {}),  # one high loss is an outlier
        ({30: 9.0, 32: 9.0}, {}),  # not in a row
        ({12: 9.0, 13: 9.0}, {}),  # the first checkpoint and the margin reach to step 12: 12 is not judged
        ({30: 9.0, 31: 9.0}, {"spike_warmup_steps": 31}),
        ({30: 9.0, 31: 9.0}, {"spike_threshold": None}),
        ({30: 0.1, 31: 0.1}, {}),  # lower is no trouble
        ({30: None, 31: None}, {}),  # two skipped steps of the ten that are allowed
    ],
)
def test_what_is_no_trouble(losses: dict[int, float | None], changes: dict[str, Any]) -> None:
    assert run(StabilityGuard(config_with(**changes), {}), losses, 1, 60)[1] is None


def test_high_losses_do_not_become_normal_by_staying() -> None:
    step, trouble = run(StabilityGuard(config_with(spike_steps=40), {}), dict.fromkeys(range(30, 100), 9.0), 1, 100)
    assert step == 69
    assert trouble is not None
    assert trouble.skip_from == 27 * BATCH


def test_too_many_skipped_steps_in_a_row_are_trouble() -> None:
    guard = StabilityGuard(config_with(max_skips_in_row=3), {})
    assert run(guard, {5: None, 6: None, 8: None, 9: None}, 1, 10)[1] is None
    step, trouble = run(guard, {12: None, 13: None, 14: None}, 11, 20)
    assert step == 14
    assert trouble is not None
    assert trouble.newest_step == 9
    assert guard.skipped_steps == 7


def test_a_new_stage_has_another_normal() -> None:
    guard = StabilityGuard(config_with(), {})
    run(guard, {}, 1, 40)
    for step in range(41, 60):
        assert guard.observe(step, (step - 1) * BATCH, 4096, 9.0 + 0.1 * math.sin(step), False) is None
    assert guard.observe(60, 59 * BATCH, 4096, 20.0, False) is None
    assert guard.observe(61, 60 * BATCH, 4096, 20.0, False) is not None


@given(st.integers(1, 39), st.integers(0, 3))
def test_a_guard_that_went_through_a_checkpoint_decides_the_same(saved: int, burst: int) -> None:
    losses: dict[int, float | None] = {20: None, 25 + burst: 9.0, 30: None, 34: 9.0, 35: None, 36: 9.0}
    unbroken = run(StabilityGuard(config_with(), {}), losses, 1, 50)
    assert unbroken[1] is not None
    first = StabilityGuard(config_with(), {})
    before = run(first, losses, 1, saved)
    if before[1] is not None:
        assert before == unbroken
        return
    resumed = StabilityGuard(config_with(), json.loads(json.dumps(first.memory())))
    assert run(resumed, losses, saved + 1, 50) == unbroken
    assert resumed.skipped_steps == 2 + (unbroken[0] > 35) - (unbroken[0] < 30)


def test_memory_is_a_copy() -> None:
    guard = StabilityGuard(config_with(), {})
    run(guard, {}, 1, 5)
    kept = guard.memory()
    before = json.dumps(kept)
    run(guard, {}, 6, 20)
    assert json.dumps(kept) == before


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 60)), max_size=5),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_the_samples_of_a_run_are_the_steps_that_touch_no_range(
    ranges: list[tuple[int, int]], first_step: int, steps: int
) -> None:
    forbidden = [(first, first + length) for first, length in ranges]
    guard = StabilityGuard(config_with(skip_samples=forbidden), {})
    sample, seen = first_step * BATCH, []
    for _ in range(steps):
        first = guard.next_sample(sample)
        seen.append(first)
        sample = first + BATCH
    allowed = (
        block * BATCH
        for block in range(first_step, 1000)
        if not any(first < (block + 1) * BATCH and end > block * BATCH for first, end in forbidden)
    )
    assert seen == [next(allowed) for _ in range(steps)]
    if steps:
        assert guard.end_of(first_step * BATCH, steps) >= sample
        # A range that begins right where the run ends is not needed.
        assert guard.end_of(first_step * BATCH, steps) == sample


def test_a_roll_back_keeps_what_was_learnt_since_the_checkpoint() -> None:
    guard = StabilityGuard(config_with(), {})
    run(guard, {}, 1, 20)
    at_checkpoint = guard.memory()
    _, trouble = run(guard, {30: 9.0, 31: 9.0}, 21, 40)
    assert trouble is not None
    guard.roll_back(trouble, at_checkpoint)
    assert guard.rollbacks == 1
    assert guard.next_sample(27 * BATCH) == 31 * BATCH
    assert guard.memory() == {
        **at_checkpoint,
        "rollbacks": 1,
        "skipped_samples": [[27 * BATCH, 31 * BATCH]],
    }


@pytest.mark.parametrize("ranges", [[[5, 5]], [[-1, 3]], [[0, 4], [9, 8]]])
def test_ranges_that_do_not_rise_are_refused_by_name(ranges: list[list[int]]) -> None:
    with pytest.raises(BadInputError, match=r"stability\.skip_samples\.\d = .*two rising sample numbers"):
        config_with(skip_samples=ranges)
