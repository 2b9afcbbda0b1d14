r"""Which source sample i comes from, and which of that source's samples it is: a pure function, with no state.

**Interleaving.** Sources with integer weights are dealt by a balanced binary tree. At a node whose left branch has
weight a of t, the first n samples hold

    left(n) = floor((n a + floor(t / 2)) / t)

samples of the left branch, and the others are the right one's; sample n goes left when ``left(n + 1) > left(n)``, and
its number there is ``left(n)`` (or ``n - left(n)`` on the right). So the share of a source after any n samples is a
closed formula, exact in the long run (the weights are fractions, not floats), and never further than half a sample a
level of the tree from ``n w``: at most ``log2(K) / 2`` samples for K sources. The cost is ``log2(K)`` integer divisions
a sample, no table and no memory. (A table of a fixed period gives shares to 1 / period only, and is as fast.)

**Stages.** A stage sets weights and sequence length from a number of tokens on, rounded up to a whole optimizer step.
Each source counts its own samples, and the count at a stage's start follows from the stages before: a new mixture goes
on where each source stood, so nothing is seen twice before an epoch is over.

**Units and parts.** A source is cut into units of one length, and shuffled by units. A stage with shorter sequences
cuts each unit into ``parts``; they are shuffled among those of a *window* of neighbouring units of the epoch's order,
so that the parts of a unit lie far apart: ``WINDOW_UNITS`` units, or a ``WINDOWS_PER_EPOCH``-th of a small source. A
change of the sequence length moves the source on to its next whole window: less than a window is left out of that
epoch, and nothing is repeated.

**Caps.** A source with ``max_epochs`` is used up when it has given that many epochs; from that sample on its weight is
shared by the others in proportion. When that happens is worked out ahead, as one more *segment* of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.permutation import KeyedPermutation
from launch.settings import BadInputError

WINDOW_UNITS = 1024
WINDOWS_PER_EPOCH = 64
# Products of a remainder and a weight must fit an int64.
MAX_TOTAL_WEIGHT = 2**31 - 1
_ROUNDED_TOTAL = 2**30
# No run is longer.
MAX_SAMPLES = 2**56
# What a source without a cap can give.
_NEVER = 2**64


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Positive ``weights`` as the smallest integers in the same proportion, exact for decimals as they are written.

    Where the integers would exceed an int64's reach (weights with ten digits and more) they are rounded to parts in
    2^30.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if (total := sum(whole)) > MAX_TOTAL_WEIGHT:
        whole = [max(1, weight * _ROUNDED_TOTAL // total) for weight in whole]
    return tuple(whole)


@dataclass(frozen=True)
class Interleaving:
    """An endless sequence of sources in exact proportion to ``weights``: positive integers, their sum below 2^31."""

    weights: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights) < 1 or sum(self.weights) > MAX_TOTAL_WEIGHT:
            raise ValueError(f"weights = {self.weights}: must be positive integers with a sum of at most 2^31 - 1")

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each position (1-D, from 0): the index of its source, and how many of that source came before."""
        sources, ordinals = np.zeros_like(positions), positions.copy()
        self._deal(0, len(self.weights), np.arange(positions.size), sources, ordinals)
        return sources, ordinals

    def _deal(
        self, low: int, high: int, chosen: NDArray[np.int64], sources: NDArray[np.int64], ordinals: NDArray[np.int64]
    ) -> None:
        """Send the positions ``chosen``, numbered within sources ``[low, high)``, down the tree."""
        if high - low == 1:
            sources[chosen] = low
            return
        middle, left, total = self._node(low, high)
        positions = ordinals[chosen]
        before = _left_of(positions, left, total)
        goes_left = _left_of(positions + 1, left, total) > before
        ordinals[chosen] = np.where(goes_left, before, positions - before)
        self._deal(low, middle, chosen[goes_left], sources, ordinals)
        self._deal(middle, high, chosen[~goes_left], sources, ordinals)

    def _node(self, low: int, high: int) -> tuple[int, int, int]:
        middle = (low + high) // 2
        return middle, sum(self.weights[low:middle]), sum(self.weights[low:high])

    def counts(self, position: int) -> tuple[int, ...]:
        """How many of the first ``position`` samples each source gave."""
        return tuple(self._counts(0, len(self.weights), position))

    def _counts(self, low: int, high: int, position: int) -> list[int]:
        if high - low == 1:
            return [position]
        middle, left, total = self._node(low, high)
        share = (position * left + total // 2) // total
        return self._counts(low, middle, share) + self._counts(middle, high, position - share)


def _left_of(positions: NDArray[np.int64], left: int, total: int) -> NDArray[np.int64]:
    whole, rest = np.divmod(positions, total)
    share: NDArray[np.int64] = whole * left + (rest * left + total // 2) // total
    return share


@dataclass(frozen=True)
class Source:
    """What the plan knows of a source: units in an epoch, how many epochs may be seen, what keys its shuffles."""

    name: str
    units: int
    key: str
    max_epochs: int | None = None

    @property
    def window_units(self) -> int:
        """How many neighbouring units shuffle their parts together."""
        return max(1, min(WINDOW_UNITS, self.units // WINDOWS_PER_EPOCH))


@dataclass(frozen=True)
class Stage:
    """A mixture from ``from_tokens`` on; ``weights`` has one for each source, 0 for those that rest.

    ``mean_loops`` is the mean depth of the stage's steps, None the run's own; nothing here depends on it.
    """

    from_tokens: int
    sequence_length: int
    weights: tuple[float, ...]
    mean_loops: int | None = None


@dataclass(frozen=True)
class Segment:
    """A stretch of samples with one mixture: a stage, or what is left of it after a source was used up.

    ``sources`` are the indices of the sources in it, ``starts`` where each one's counter stands at ``from_sample``, in
    sequences of this segment's length since the source's first.
    """

    from_sample: int
    stage: Stage
    parts: int
    sources: tuple[int, ...]
    starts: tuple[int, ...]
    interleaving: Interleaving


class Located(NamedTuple):
    """Where samples come from: ``place`` is a position in the epoch's order of units, ``part`` a piece of that unit."""

    source: NDArray[np.int64]
    epoch: NDArray[np.int64]
    place: NDArray[np.int64]
    part: NDArray[np.int64]


class SamplingPlan:
    """Every sample of a run, worked out from sources and stages.

    ``unit_length`` is the longest sequence in tokens; every stage's divides it. ``step_samples`` is the number of
    sequences of an optimizer step: a stage begins with a whole step. Raises ``BadInputError`` when two stages would
    begin with the same step.
    """

    def __init__(
        self, sources: Sequence[Source], stages: Sequence[Stage], unit_length: int, step_samples: int, seed: int
    ) -> None:
        self.sources, self.unit_length, self.seed = tuple(sources), unit_length, seed
        self.segments: list[Segment] = []
        self.end: int | None = None
        """The first sample that no source can give; None when the data never ends."""
        self._windows: dict[tuple[int, int, int, int], KeyedPermutation] = {}
        used = [0] * len(self.sources)  # units
        from_sample = tokens = 0
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            until = MAX_SAMPLES
            if following is not None:
                step_tokens = step_samples * stage.sequence_length
                steps = -(-(following.from_tokens - tokens) // step_tokens)
                if steps < 1:
                    raise BadInputError(
                        f"data.stages: from_tokens = {following.from_tokens}: begins with the same optimizer step as "
                        f"the stage before it, which covers tokens {tokens} to {tokens + step_tokens}; move it on"
                    )
                until = from_sample + steps * step_samples
                tokens += steps * step_tokens
            self._add_stage(stage, from_sample, until, used)
            from_sample = until
            if self.end is not None:
                break
        self._from_samples = np.array([segment.from_sample for segment in self.segments], dtype=np.int64)

    def _add_stage(self, stage: Stage, from_sample: int, until: int, used: list[int]) -> None:
        """Append the segments of ``[from_sample, until)``, and move ``used`` on."""
        parts = self.unit_length // stage.sequence_length
        counters = {k: self._first_sample(k, used[k], parts) for k, weight in enumerate(stage.weights) if weight > 0}
        while from_sample < until:
            left = {k: self._capacity(k, parts) - counter for k, counter in counters.items()}
            chosen = tuple(k for k, remaining in left.items() if remaining > 0)
            if not chosen:
                self.end = from_sample
                break
            mixture = Interleaving(whole_weights([stage.weights[k] for k in chosen]))
            starts = tuple(counters[k] for k in chosen)
            self.segments.append(Segment(from_sample, stage, parts, chosen, starts, mixture))
            length = _longest(mixture, [left[k] for k in chosen], until - from_sample)
            for k, count in zip(chosen, mixture.counts(length), strict=True):
                counters[k] += count
            from_sample += length
        for k, counter in counters.items():
            used[k] = self._units_used(k, counter, parts)

    def _capacity(self, source: int, parts: int) -> int:
        entry = self.sources[source]
        return _NEVER if entry.max_epochs is None else entry.max_epochs * entry.units * parts

    def _first_sample(self, source: int, used_units: int, parts: int) -> int:
        """The counter, in sequences of this stage's length, of a source that has given ``used_units`` units."""
        units, window = self.sources[source].units, self.sources[source].window_units
        epoch, inside = divmod(used_units, units)
        if parts > 1:
            inside = min(-(-inside // window) * window, units)
        return (epoch * units + inside) * parts

    def _units_used(self, source: int, counter: int, parts: int) -> int:
        """How many units are used up by the sequences before ``counter``: whole windows where units have parts."""
        if parts == 1:
            return counter
        return self._first_sample(source, -(-counter // parts), parts) // parts

    def segment_at(self, sample: int) -> Segment:
        """The segment of a sample; ``BadInputError`` past the last one that the sources can give."""
        self._require_inside(sample)
        return self.segments[int(np.searchsorted(self._from_samples, sample, side="right")) - 1]

    def _require_inside(self, last: int) -> None:
        if self.end is not None and last >= self.end:
            raise BadInputError(
                f"sample {last}: every source with a weight is used up after sample {self.end - 1}; raise "
                "data.sources' max_epochs, add sources, or train fewer steps"
            )

    def tokens_before(self, sample: int) -> int:
        """Sequence positions of all samples before ``sample``."""
        ends = [*(segment.from_sample for segment in self.segments[1:]), MAX_SAMPLES]
        return sum(
            max(0, min(sample, end) - segment.from_sample) * segment.stage.sequence_length
            for segment, end in zip(self.segments, ends, strict=True)
        )

    def locate(self, sample_ids: NDArray[np.int64]) -> Located:
        """Source, epoch, place and part of each sample (1-D int64): the pure function."""
        if sample_ids.size:
            if int(sample_ids.min()) < 0:
                raise IndexError("sample ids start at 0")
            self._require_inside(int(sample_ids.max()))
        result = Located(*(np.zeros_like(sample_ids) for _ in Located._fields))
        numbers = np.searchsorted(self._from_samples, sample_ids, side="right") - 1
        for number in np.unique(numbers):
            segment, inside = self.segments[number], np.flatnonzero(numbers == number)
            slots, ordinals = segment.interleaving.locate(sample_ids[inside] - segment.from_sample)
            for slot, source in enumerate(segment.sources):
                chosen = np.flatnonzero(slots == slot) if len(segment.sources) > 1 else np.arange(slots.size)
                if chosen.size:
                    rows = inside[chosen]
                    result.source[rows] = source
                    counters = ordinals[chosen] + segment.starts[slot]
                    result.epoch[rows], result.place[rows], result.part[rows] = self._place(
                        source, counters, segment.parts
                    )
        return result

    def _place(
        self, source: int, counters: NDArray[np.int64], parts: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        units, window_units = self.sources[source].units, self.sources[source].window_units
        epochs, inside = np.divmod(counters, units * parts)
        if parts == 1:
            return epochs, inside, np.zeros_like(inside)
        windows, places = np.divmod(inside, window_units * parts)
        for epoch, window in {*zip(epochs.tolist(), windows.tolist(), strict=True)}:
            chosen = (epochs == epoch) & (windows == window)
            places[chosen] = self._window(source, epoch, window, parts)(places[chosen])
        return epochs, windows * window_units + places // parts, places % parts

    def _window(self, source: int, epoch: int, window: int, parts: int) -> KeyedPermutation:
        name = (source, epoch, window, parts)
        permutation = self._windows.get(name)
        if permutation is None:
            entry = self.sources[source]
            size = min(entry.window_units, entry.units - window * entry.window_units) * parts
            key = f"{self.seed}/{entry.key}/window/{parts}/{epoch}/{window}"
            permutation = KeyedPermutation(size, key.encode())
            if len(self._windows) >= 4 * len(self.sources):
                self._windows = {}  # a step reads one or two windows of a source; forgetting keeps memory flat
            self._windows[name] = permutation
        return permutation

    def epochs_before(self, sample: int) -> tuple[float, ...]:
        """For each source, how many epochs of it the samples before ``sample`` use up."""
        used = [0.0] * len(self.sources)
        ends = [*(segment.from_sample for segment in self.segments[1:]), MAX_SAMPLES]
        for segment, end in zip(self.segments, ends, strict=True):
            if segment.from_sample >= sample:
                break
            counts = segment.interleaving.counts(min(sample, end) - segment.from_sample)
            for k, start, count in zip(segment.sources, segment.starts, counts, strict=True):
                used[k] = (start + count) / (self.sources[k].units * segment.parts)
        return tuple(used)

    def used_up(self, sample: int) -> list[tuple[str, int]]:
        """The sources that reach their cap before ``sample``: name and the sample from which they give no more."""
        found: dict[int, int] = {}
        for segment in self.segments:
            wanted = {k for k, weight in enumerate(segment.stage.weights) if weight > 0}
            for k in sorted(wanted - set(segment.sources)):
                found.setdefault(k, segment.from_sample)
        if self.end is not None:
            for k in self.segments[-1].sources:
                found.setdefault(k, self.end)
        return [(self.sources[k].name, first) for k, first in found.items() if first < sample]

    def history(self) -> list[dict[str, Any]]:
        """The segments as plain values, by which a resume tells a changed past from a changed future."""
        return [
            {
                "from_sample": segment.from_sample,
                "sequence_length": segment.stage.sequence_length,
                "mean_loops": segment.stage.mean_loops,
                "weights": {
                    self.sources[k].name: weight
                    for k, weight in zip(segment.sources, segment.interleaving.weights, strict=True)
                },
            }
            for segment in self.segments
        ]


def _longest(mixture: Interleaving, left: Sequence[int], limit: int) -> int:
    """The largest n up to ``limit`` whose first n samples take no more than ``left`` of each source."""

    def fits(length: int) -> bool:
        return all(count <= most for count, most in zip(mixture.counts(length), left, strict=True))

    if fits(limit):
        return limit
    low, high = 0, limit  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
