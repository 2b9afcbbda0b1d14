"""The mixture: exact shares, even stretches, counters that go on over stages, caps worked out ahead."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import mixture
from data_pipeline.mixture import Interleaving, SamplingPlan, Source, Stage, whole_weights
from launch.settings import BadInputError

Weights = st.lists(st.integers(1, 50), min_size=1, max_size=9).map(tuple)


def sources_of(*units: int, max_epochs: tuple[int | None, ...] | None = None) -> list[Source]:
    caps = max_epochs or (None,) * len(units)
    return [Source(f"s{i}", n, f"key{i}", cap) for i, (n, cap) in enumerate(zip(units, caps, strict=True))]


def plan_of(sources: list[Source], *stages: Stage, unit: int = 8, step: int = 4, seed: int = 0) -> SamplingPlan:
    return SamplingPlan(sources, stages, unit, step, seed)


@given(Weights, st.integers(0, 2**40))
def test_ordinals_of_each_source_go_on_by_one_and_counts_agree(weights: tuple[int, ...], start: int) -> None:
    mixture = Interleaving(weights)
    before = mixture.counts(start)
    sources, ordinals = mixture.locate(np.arange(start, start + 300))
    expected = list(before)
    for source, ordinal in zip(sources.tolist(), ordinals.tolist(), strict=True):
        assert ordinal == expected[source]
        expected[source] += 1
    assert tuple(expected) == mixture.counts(start + 300)


@given(Weights)
def test_shares_are_exact_over_every_period(weights: tuple[int, ...]) -> None:
    total = sum(weights)
    # The tree's nodes repeat together after a common multiple of their totals, and the root after `total`.
    for periods in (math.prod(weights[:3]) * total, 10**15 * total):
        counts = Interleaving(weights).counts(periods)
        depth = math.ceil(math.log2(len(weights))) if len(weights) > 1 else 0
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - periods * weight // total) <= depth / 2
    assert Interleaving((3, 5)).counts(8 * 10**12) == (3 * 10**12, 5 * 10**12)


@given(Weights, st.integers(0, 10**6))
def test_every_stretch_is_within_half_a_sample_a_level_of_its_share(weights: tuple[int, ...], position: int) -> None:
    counts = Interleaving(weights).counts(position)
    assert sum(counts) == position
    levels = math.ceil(math.log2(len(weights))) if len(weights) > 1 else 0
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - Fraction(position * weight, sum(weights))) <= Fraction(levels, 2)


def test_the_interleaving_is_frozen() -> None:
    # A change would silently give resumed runs other data.
    sources, ordinals = Interleaving((3, 1, 2)).locate(np.arange(12))
    assert sources.tolist() == [0, 2, 0, 1, 0, 2, 0, 2, 0, 1, 0, 2]
    assert ordinals.tolist() == [0, 0, 1, 0, 2, 1, 3, 2, 4, 1, 5, 3]


def test_no_overflow_at_the_largest_positions_and_weights() -> None:
    weights = (2**30 - 7, 2**30 - 1)
    position = mixture.MAX_SAMPLES - 1
    sources, ordinals = Interleaving(weights).locate(np.array([position]))
    counts, following = Interleaving(weights).counts(position), Interleaving(weights).counts(position + 1)
    assert ordinals.tolist() == [counts[sources[0]]]
    assert following[sources[0]] == counts[sources[0]] + 1


def test_weights_become_exact_fractions() -> None:
    assert whole_weights([0.6, 0.3, 0.1]) == (6, 3, 1)
    assert whole_weights([1.0]) == (1,)
    assert whole_weights([2, 4]) == (1, 2)
    assert whole_weights([0.125, 1e-3]) == (125, 1)
    tiny = whole_weights([1.0, 1e-30])
    assert tiny[1] == 1
    assert sum(tiny) <= mixture.MAX_TOTAL_WEIGHT
    with pytest.raises(ValueError, match="positive integers"):
        Interleaving((1, 0))


def test_one_source_is_its_own_order() -> None:
    located = plan_of(sources_of(10), Stage(0, 8, (1.0,))).locate(np.arange(25))
    assert located.place.tolist() == [*range(10), *range(10), *range(5)]
    assert located.epoch.tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert not located.part.any()


plans = st.builds(
    lambda units, caps, weights, gaps, lengths, seed: (units, caps, weights, gaps, lengths, seed),
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.lists(st.one_of(st.none(), st.integers(1, 3)), min_size=4, max_size=4),
    st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(64, 900), min_size=3, max_size=3),
    st.lists(st.sampled_from([1, 2, 4, 8]), min_size=4, max_size=4),
    st.integers(0, 99),
)


def small_windows(units: int) -> contextlib.AbstractContextManager[object]:
    """Windows of ``units`` units for sources of a few dozen."""
    return mock.patch.multiple(mixture, WINDOW_UNITS=units, WINDOWS_PER_EPOCH=1)


def build(drawn: tuple[list[int], ...], window: int = 4) -> SamplingPlan:
    units, caps, weights, gaps, lengths, seed = drawn
    sources = sources_of(*units, max_epochs=tuple(caps[: len(units)]))
    stages, tokens = [], 0
    for number, row in enumerate(weights):
        row = row[: len(units)]
        if sum(row) == 0:
            row = [1] * len(units)
        stages.append(Stage(tokens, lengths[number], tuple(map(float, row))))
        tokens += gaps[min(number, 2)]
    with small_windows(window):
        return plan_of(sources, *stages, seed=seed)


def samples_of(plan: SamplingPlan, most: int = 700) -> int:
    return most if plan.end is None else min(most, plan.end)


@settings(max_examples=80)
@given(plans)
def test_nothing_is_seen_twice_in_an_epoch_and_caps_hold_whatever_the_stages(drawn: tuple[list[int], ...]) -> None:
    plan = build(drawn)
    n = samples_of(plan)
    with small_windows(4):
        located = plan.locate(np.arange(n))
    seen: Counter[tuple[int, int, int, int]] = Counter()
    for i, (source, epoch, place, part) in enumerate(zip(*(field.tolist() for field in located), strict=True)):
        length = plan.segment_at(i).stage.sequence_length
        assert 0 <= place < plan.sources[source].units
        cap = plan.sources[source].max_epochs
        assert cap is None or epoch < cap
        for token in range(part * length, (part + 1) * length):
            assert token < plan.unit_length
            seen[source, epoch, place, token] += 1
    assert set(seen.values()) <= {1}


@settings(max_examples=100)
@given(plans, st.lists(st.integers(0, 699), min_size=1, max_size=20))
def test_a_sample_depends_on_its_number_only(drawn: tuple[list[int], ...], ids: list[int]) -> None:
    plan, other = build(drawn), build(drawn)
    ids = [i for i in ids if plan.end is None or i < plan.end]
    with small_windows(4):
        together = plan.locate(np.array(ids, dtype=np.int64))
        for row, i in enumerate(ids):
            alone = other.locate(np.array([i]))
            assert [int(field[0]) for field in alone] == [int(field[row]) for field in together]


@settings(max_examples=100)
@given(plans)
def test_with_one_length_every_epoch_is_complete_and_in_order(drawn: tuple[list[int], ...]) -> None:
    units, caps, weights, gaps, _, seed = drawn
    plan = build((units, caps, weights, gaps, [8] * 4, seed))
    located = plan.locate(np.arange(samples_of(plan)))
    for source, entry in enumerate(plan.sources):
        chosen = located.source == source
        counters = located.epoch[chosen] * entry.units + located.place[chosen]
        assert counters.tolist() == list(range(chosen.sum())), "a source's own counter goes on over every change"


@settings(max_examples=60)
@given(plans, st.integers(1, 400))
def test_a_changed_future_leaves_the_past(drawn: tuple[list[int], ...], change: int) -> None:
    plan = build(drawn)
    past = [segment for segment in plan.segments if segment.from_sample < change]
    stages = list({id(segment.stage): segment.stage for segment in past}.values())
    tokens = plan.tokens_before(-(-change // 4) * 4)
    if plan.end is not None and plan.end <= change + 4:
        return
    new = Stage(tokens + 1, 4, tuple(1.0 for _ in plan.sources))
    with small_windows(4):
        other = plan_of(list(plan.sources), *stages, new, seed=drawn[5])
        for before, after in zip(plan.locate(np.arange(change)), other.locate(np.arange(change)), strict=True):
            np.testing.assert_array_equal(before, after)


def test_a_used_up_source_gives_its_weight_to_the_others_in_proportion() -> None:
    plan = plan_of(sources_of(100, 10**6, 10**6, max_epochs=(1, None, None)), Stage(0, 8, (5.0, 3.0, 2.0)))
    assert plan.used_up(10**4) == [("s0", plan.segments[1].from_sample)]
    end = plan.segments[1].from_sample
    assert 199 <= end <= 202
    located = plan.locate(np.arange(end + 10_000))
    counts = np.bincount(located.source[:end], minlength=3)
    assert counts[0] == 100
    assert np.abs(counts - end * np.array([0.5, 0.3, 0.2])).max() <= 1
    after = np.bincount(located.source[end:], minlength=3)
    assert after[0] == 0
    assert np.abs(after - 10_000 * np.array([0, 0.6, 0.4])).max() <= 1
    assert plan.epochs_before(end + 10_000)[0] == 1.0
    assert plan.used_up(end) == []


def test_when_every_source_is_used_up_the_data_ends() -> None:
    plan = plan_of(sources_of(30, 12, max_epochs=(2, 3)), Stage(0, 8, (1.0, 1.0)))
    assert plan.end == 2 * 30 + 3 * 12
    located = plan.locate(np.arange(plan.end))
    assert Counter(located.source.tolist()) == {0: 60, 1: 36}
    assert {name for name, _ in plan.used_up(10**6)} == {"s0", "s1"}
    with pytest.raises(BadInputError, match="sample 96: every source with a weight is used up after sample 95"):
        plan.locate(np.array([plan.end]))
    with pytest.raises(IndexError):
        plan.locate(np.array([-1]))


def test_stages_begin_with_a_whole_step_and_tokens_add_up() -> None:
    plan = plan_of(
        sources_of(1000, 1000), Stage(0, 2, (1.0, 0.0)), Stage(100, 8, (1.0, 1.0)), Stage(1000, 4, (0.0, 1.0))
    )
    starts = [segment.from_sample for segment in plan.segments]
    # 100 tokens are 12.5 steps of 4 x 2: 13 steps, 104 tokens; then 896 tokens are 28 steps of 4 x 8.
    assert starts == [0, 13 * 4, 13 * 4 + 28 * 4]
    assert [plan.tokens_before(start) for start in starts] == [0, 104, 1000]
    assert plan.tokens_before(starts[2] + 3) == 1012
    assert [plan.segment_at(i).stage.sequence_length for i in (0, 51, 52, 163, 164)] == [2, 2, 8, 8, 4]


def test_two_stages_in_one_step_are_refused() -> None:
    with pytest.raises(BadInputError, match="from_tokens = 20: begins with the same optimizer step"):
        plan_of(sources_of(10), Stage(0, 8, (1.0,)), Stage(10, 8, (1.0,)), Stage(20, 8, (1.0,)))


def test_parts_of_a_unit_lie_far_apart_and_a_change_of_length_skips_less_than_a_window() -> None:
    plan = plan_of(sources_of(66_000), Stage(0, 1, (1.0,)), Stage(80_000, 8, (1.0,)))
    located = plan.locate(np.arange(80_000))
    places = defaultdict(list)
    for i, place in enumerate(located.place.tolist()):
        places[place].append(i)
    whole = [np.diff(found) for found in places.values() if len(found) == 8]
    # Within a window of 8 x 1,024 samples the mean distance of neighbouring parts is a ninth of it.
    assert 0.9 < np.mean(whole) * 9 / (8 * mixture.WINDOW_UNITS) < 1.1
    first = plan.locate(np.array([80_000]))
    assert 10_000 <= int(first.place[0]) < 10_000 + mixture.WINDOW_UNITS
    assert int(first.place[0]) > max(places)


def test_a_small_source_loses_less_than_a_64th_of_an_epoch_to_a_change_of_length() -> None:
    sources = sources_of(300, 20, max_epochs=(1, 1))
    plan = plan_of(sources, Stage(0, 8, (1.0, 1.0)), Stage(8 * 12, 2, (1.0, 1.0)))
    located = plan.locate(np.array([12, 13]))
    places = dict(zip(located.source.tolist(), located.place.tolist(), strict=True))
    assert 8 <= places[0] < 12, "six units were seen, and windows have four"
    assert places[1] == 6, "with 20 units windows have one"
    first, second = plan.used_up(10**4)
    assert first[0] == "s1"
    assert abs(first[1] - (12 + 2 * 4 * 14)) <= 1
    assert second == ("s0", plan.end)


def test_a_source_that_is_used_up_when_a_stage_wants_it_is_told() -> None:
    plan = plan_of(sources_of(8, 100, max_epochs=(1, None)), Stage(0, 8, (1.0, 0.0)), Stage(64, 8, (1.0, 1.0)))
    assert plan.used_up(100) == [("s0", 8)]
    assert plan.used_up(8) == []


def test_history_has_what_the_past_depends_on() -> None:
    plan = plan_of(sources_of(100, 50, max_epochs=(None, 1)), Stage(0, 8, (0.5, 0.5)), Stage(4000, 4, (1.0, 0.0), 7))
    first, second, third = plan.history()
    assert first == {
        "from_sample": 0,
        "sequence_length": 8,
        "mean_loops": None,
        "weights": {"s0": 1, "s1": 1},
    }
    assert second["weights"] == {"s0": 1}
    assert (third["sequence_length"], third["mean_loops"]) == (4, 7)
