r"""The best run at a given budget of training FLOPs: parameters N, tokens D and, with a law that has loops, depth T.

    minimise over N, T:   L(N, D, T)   with   D = C / flops_per_token(N, T)

A law of losses does not know what a token costs, and ``6 N D`` leaves out loops, attention and the head. The sweep does
know, exactly, for every run; so the family of models is read from it. Of each size, FLOPs a token are a constant part
and one for each loop, ``f0 + f1 T`` (from its runs of several depths); between and beyond the sizes, N_once, N_rec, f0
and f1 are powers of N. ``misfit`` says how far that is from the runs' own FLOPs.

Depths are whole numbers between the least and the most that were trained. An optimum at the edge of what was searched,
or beyond the sizes that were measured, says so: the law is extrapolated there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from launch.fitting.bootstrap import Interval, interval_of
from launch.fitting.chinchilla import Chinchilla, distinct
from launch.fitting.runs import Floats, Points, Runs

_GRID = 600  # sizes that are tried at each depth
_BEYOND = 100.0  # times the largest and the least size measured, at the measured FLOPs; more with the budget
_SAME_SIZE = 0.01


@dataclass(frozen=True)
class Family:
    """The models of a sweep, made continuous: everything a power of N, as ``log value = intercept + slope log N``."""

    once: tuple[float, float]
    recurrent: tuple[float, float]
    fixed_flops: tuple[float, float]  # a token, outside the loops; all of them when there is one depth only
    loop_flops: tuple[float, float] | None  # a token and loop
    depths: tuple[int, ...]  # every one from the least to the most trained
    trained_depths: tuple[int, ...]
    sizes: tuple[float, float]  # the least and the most parameters measured
    tokens: tuple[float, float]
    flops: float  # of the largest run
    misfit: float  # relative, the worst, of a run's FLOPs

    def points(self, parameters: Floats, loops: Floats, budget: float) -> Points:
        """Models of ``parameters`` at ``loops``, trained for ``budget`` FLOPs."""
        log_N = np.log(parameters)
        once, recurrent = _power(self.once, log_N), _power(self.recurrent, log_N)
        scale = parameters / (once + recurrent)  # two powers do not quite add up to N
        return Points(once * scale, recurrent * scale, loops, budget / self.token_flops(parameters, loops))

    def token_flops(self, parameters: Floats, loops: Floats) -> Floats:
        """Training FLOPs of a token."""
        log_N = np.log(parameters)
        fixed = _power(self.fixed_flops, log_N)
        return fixed if self.loop_flops is None else fixed + loops * _power(self.loop_flops, log_N)


@dataclass(frozen=True)
class AtDepth:
    """The best run of one depth at a budget."""

    loops: int
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Optimum:
    """The best run at ``budget``, and the best of each trained depth; ``edges`` says where the search ended."""

    budget: float
    parameters: float
    loops: int
    tokens: float
    loss: float
    intervals: dict[str, Interval | None]  # of parameters, loops, tokens, loss
    at_depths: tuple[AtDepth, ...]
    edges: tuple[str, ...]

    @property
    def tokens_per_parameter(self) -> float:
        """D / N, every parameter counted once."""
        return self.tokens / self.parameters


def family_of(runs: Runs) -> Family | str:
    """The family that ``runs`` are of, or why they show none."""
    if distinct(runs.points.unique) < 2:
        return "one size only: how a size's cost grows cannot be read from it"
    token_flops = runs.flops / runs.points.tokens
    sizes: list[tuple[float, float, float, float, float]] = []
    depths = sorted({row.mean_loops for row in runs.rows})
    for first in _sizes(runs):
        mine = np.abs(runs.points.unique / runs.points.unique[first] - 1) <= _SAME_SIZE
        once, recurrent = float(runs.points.once[first]), float(runs.points.recurrent[first])
        executed = runs.executed_loops[mine]
        if len(depths) == 1:
            sizes.append((once + recurrent, once, recurrent, float(token_flops[mine].mean()), np.nan))
        elif np.ptp(executed) > _SAME_SIZE * executed.mean():
            slope, constant = np.polyfit(executed, token_flops[mine], 1)
            sizes.append((once + recurrent, once, recurrent, float(constant), float(slope)))
    if len(sizes) < 2:
        return "fewer than two sizes have several depths: what a loop costs cannot be read from the others"
    columns = np.array(sizes)
    if (columns[:, 1:3] <= 0).any() or (columns[:, 3:] <= 0).any():
        return "a size has no parameters outside its loops, or they cost nothing: no power law goes through 0"
    log_N = np.log(columns[:, 0])
    powers = [_fit_power(log_N, columns[:, index]) for index in (1, 2, 3)]
    looped = None if len(depths) == 1 else _fit_power(log_N, columns[:, 4])
    tokens = runs.points.tokens
    bare = Family(
        once=powers[0],
        recurrent=powers[1],
        fixed_flops=powers[2],
        loop_flops=looped,
        depths=tuple(range(depths[0], depths[-1] + 1)),
        trained_depths=tuple(depths),
        sizes=(float(runs.points.unique.min()), float(runs.points.unique.max())),
        tokens=(float(tokens.min()), float(tokens.max())),
        flops=float(runs.flops.max()),
        misfit=0.0,
    )
    off = bare.token_flops(runs.points.unique, runs.executed_loops) / token_flops - 1
    return replace(bare, misfit=float(np.abs(off).max()))


def best_run(
    law: Chinchilla,
    x_P: Floats,
    resampled: Sequence[Floats],
    family: Family,
    budget: float,
    level: float,
    most_parameters: float | None = None,
) -> Optimum:
    """The optimum of ``law`` at ``x_P``, at ``most_parameters`` at most; intervals from its other fits, ``resampled``.

    Without that limit, and with phi < 1, the best depth is the least: the loops' FLOPs are better spent on parameters.
    """
    reach = _BEYOND * max(1.0, budget / family.flops)
    upper = family.sizes[1] * reach if most_parameters is None else most_parameters
    parameters = np.geomspace(min(family.sizes[0] / reach, upper / reach), upper, _GRID)
    depths = np.array(family.depths, dtype=np.float64)
    grid = [family.points(parameters, np.full(_GRID, depth), budget) for depth in depths]

    def lowest(x_P: Floats, losses_TN: Floats, depth: int) -> tuple[AtDepth, int]:
        """The best run at one place of ``depths``, and its place among ``parameters``."""
        place = int(np.argmin(losses_TN[depth]))
        best_N = _refined(np.log(parameters), losses_TN[depth], place)
        at = family.points(np.array([best_N]), depths[[depth]], budget)
        loss = float(np.exp(law.log_loss(x_P, at))[0])
        return AtDepth(int(depths[depth]), best_N, float(at.tokens[0]), loss), place

    def losses_of(x_P: Floats) -> Floats:
        return np.stack([law.log_loss(x_P, points) for points in grid])

    losses_TN = losses_of(x_P)
    best, place = lowest(x_P, losses_TN, int(losses_TN.min(axis=1).argmin()))
    drawn = []
    for each in resampled:
        others_TN = losses_of(each)
        other = lowest(each, others_TN, int(others_TN.min(axis=1).argmin()))[0]
        drawn.append([other.parameters, float(other.loops), other.tokens, other.loss])
    names = ("parameters", "loops", "tokens", "loss")
    edges = []
    if place in (0, _GRID - 1):
        limited = most_parameters is not None and place > 0
        edges.append("parameters at their limit" if limited else "parameters at the edge of the search")
    places = (("parameters", best.parameters, family.sizes), ("tokens", best.tokens, family.tokens))
    for name, value, (least, most) in places:
        if value > most:
            edges.append(f"{name} {value / most:.3g} times the most measured")
        elif value < least:
            edges.append(f"{name} 1/{least / value:.3g} of the least measured")
    if len(depths) > 1 and best.loops in (family.depths[0], family.depths[-1]):
        edges.append(f"loops at the {'least' if best.loops == family.depths[0] else 'most'} trained")
    return Optimum(
        budget,
        best.parameters,
        best.loops,
        best.tokens,
        best.loss,
        {name: interval_of([each[column] for each in drawn], level) for column, name in enumerate(names)},
        tuple(lowest(x_P, losses_TN, family.depths.index(depth))[0] for depth in family.trained_depths),
        tuple(edges),
    )


def _sizes(runs: Runs) -> list[int]:
    """The place of one run of each size."""
    found: list[int] = []
    for place, value in enumerate(runs.points.unique):
        if all(abs(value / runs.points.unique[other] - 1) > _SAME_SIZE for other in found):
            found.append(place)
    return found


def _fit_power(log_N: Floats, values: Floats) -> tuple[float, float]:
    slope, intercept = np.polyfit(log_N, np.log(values), 1)
    return float(intercept), float(slope)


def _power(line: tuple[float, float], log_N: Floats) -> Floats:
    powers: Floats = np.exp(line[0] + line[1] * log_N)
    return powers


def _refined(log_N: Floats, losses: Floats, place: int) -> float:
    """The minimum between grid points, by the parabola through three of them."""
    if place in (0, len(log_N) - 1):
        return float(np.exp(log_N[place]))
    left, middle, right = losses[place - 1 : place + 2]
    shift = 0.5 * (left - right) / (left - 2 * middle + right) if left + right > 2 * middle else 0.0
    return float(np.exp(log_N[place] + shift * (log_N[1] - log_N[0])))
