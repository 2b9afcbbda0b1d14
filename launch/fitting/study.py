"""Everything that is fitted to a sweep's results, in order, as one value that is drawn, printed and written as JSON.

Each part stands alone: what the runs do not show is left out with its reason, and the others go on. Only a part that
was asked for by name must be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from launch.fitting.bootstrap import Interval, draw_runs, interval_of
from launch.fitting.chinchilla import Chinchilla, why_not_chinchilla
from launch.fitting.depth import LEAST_DEPTHS, DepthFit, depth_series, fit_depth
from launch.fitting.holdout import HeldOut, Unseen, predict_unseen
from launch.fitting.huber import DELTA, Problem
from launch.fitting.isoflop import LEAST_SIZES, OptimumGrowth, Parabola, fit_parabolas
from launch.fitting.looped import Looped, why_not_looped
from launch.fitting.optimum import Family, Optimum, best_run, family_of
from launch.fitting.runs import Counted, Floats, LossUnit, Points, ResultRow, Runs, as_runs
from launch.settings import BadInputError

Part = Literal["chinchilla", "looped", "isoflop", "depth"]
PARTS: tuple[Part, ...] = get_args(Part)
_LAWS: dict[Part, tuple[type[Chinchilla], Callable[[Points], str | None]]] = {
    "chinchilla": (Chinchilla, why_not_chinchilla),
    "looped": (Looped, why_not_looped),
}
_STREAMS = {part: number for number, part in enumerate(PARTS)}  # each part draws from its own
Progress = Callable[[Sequence[Floats], str], Iterator[Floats]]


@dataclass(frozen=True)
class Settings:
    """What may be chosen of a study. ``required`` parts must be fitted; the others are where the runs allow."""

    unit: LossUnit = "nats"
    counted: Counted = "active"
    required: tuple[Part, ...] = ("chinchilla",)
    optional: tuple[Part, ...] = ("looped", "isoflop", "depth")
    budgets: tuple[float, ...] = ()  # FLOPs; none: the largest measured, and ten times that
    most_parameters: float | None = None  # of the best run
    resamples: int = 400
    level: float = 0.95
    delta: float = DELTA
    seed: int = 0


@dataclass(frozen=True)
class LawFit:
    """A law over all runs. ``predicted`` and ``mean_error`` (relative, absolute) at the runs themselves."""

    law: Chinchilla
    x_P: Floats
    resampled: tuple[Floats, ...]
    coefficients: dict[str, float]
    intervals: dict[str, Interval | None]
    no_intervals: str | None  # why there are none
    converged: bool
    unconverged_resamples: int
    at_bounds: tuple[str, ...]
    predicted: Floats
    mean_error: float
    held_out: dict[Unseen, HeldOut | str]

    def to_json(self) -> dict[str, Any]:
        """Its numbers."""
        return {
            "equation": self.law.equation,
            "coefficients": self.coefficients,
            "intervals": {name: _plain(interval) for name, interval in self.intervals.items()},
            "no_intervals": self.no_intervals,
            "converged": self.converged,
            "resamples": len(self.resampled),
            "unconverged_resamples": self.unconverged_resamples,
            "at_bounds": list(self.at_bounds),
            "mean_error": self.mean_error,
            "held_out": {what: _plain(result) for what, result in self.held_out.items()},
        }


@dataclass(frozen=True)
class Study:
    """What came of it; ``left_out`` says why a part is missing."""

    settings: Settings
    runs: Runs
    laws: dict[Part, LawFit]
    parabolas: list[Parabola]
    growth: list[OptimumGrowth]
    depths: list[DepthFit]
    family: Family | None
    optima: list[Optimum]
    left_out: dict[str, str]

    @property
    def best_law(self) -> LawFit | None:
        """The law that knows loops where there is one."""
        return self.laws.get("looped") or self.laws.get("chinchilla")

    def to_json(self) -> dict[str, Any]:
        """All numbers, and each run's prediction."""
        rows = self.runs.rows
        return {
            "settings": asdict(self.settings),
            "runs": [
                {
                    "cell": row.cell,
                    "config_hash": row.config_hash,
                    "loss": float(self.runs.loss[index]),
                    "predicted": {part: float(fit.predicted[index]) for part, fit in self.laws.items()},
                }
                for index, row in enumerate(rows)
            ],
            "data": sorted({fingerprint for row in rows for fingerprint in row.data.values()}),
            "laws": {part: fit.to_json() for part, fit in self.laws.items()},
            "isoflop": {
                "parabolas": [
                    {**_plain(parabola), "runs": [rows[place].cell for place in parabola.runs]}
                    for parabola in self.parabolas
                ],
                "growth": [_plain(each) for each in self.growth],
            },
            "depth": [_plain(fit) for fit in self.depths],
            "optimum": {
                "family": None if self.family is None else _plain(self.family),
                "best": [{**_plain(each), "tokens_per_parameter": each.tokens_per_parameter} for each in self.optima],
            },
            "left_out": self.left_out,
        }


def make_study(rows: Sequence[ResultRow], settings: Settings, progress: Progress | None = None) -> Study:
    """Fit everything. ``progress`` wraps the draws of a law, to be watched.

    Raises ``BadInputError`` when a part that ``settings`` requires cannot be fitted to ``rows``.
    """
    runs = as_runs(rows, settings.counted, settings.unit)
    wanted = [part for part in PARTS if part in (*settings.required, *settings.optional)]
    left_out: dict[str, str] = {}

    def leave_out(part: Part, reason: str) -> None:
        if part in settings.required:
            raise BadInputError(f"the {part} fit needs other runs: {reason}")
        left_out[part] = reason

    fitted: list[Part] = []
    for part in wanted:
        if part in _LAWS:
            reason = _LAWS[part][1](runs.points)
            if reason is None:
                fitted.append(part)
            else:
                leave_out(part, reason)
    laws = {part: _fit_law(part, runs, settings, progress) for part in fitted}
    parabolas: list[Parabola] = []
    growth: list[OptimumGrowth] = []
    if "isoflop" in wanted:
        generator = _generator(settings, "isoflop")
        parabolas, growth = fit_parabolas(runs, settings.resamples, settings.level, generator)
        if not parabolas:
            leave_out("isoflop", f"no FLOP level has {LEAST_SIZES} sizes at one mean depth")
    depths: list[DepthFit] = []
    if "depth" in wanted:
        generator = _generator(settings, "depth")
        series = depth_series(rows, settings.unit)
        depths = [fit_depth(each, settings.resamples, settings.level, generator) for each in series]
        if not depths:
            leave_out(
                "depth",
                f"no run was evaluated at {LEAST_DEPTHS} depths (python launch/sweep.py FILE --evaluate 1,2,4,8), and "
                f"no size was trained at {LEAST_DEPTHS} on the same tokens",
            )
    family, optima = _optima(runs, laws, settings, left_out)
    return Study(settings, runs, laws, parabolas, growth, depths, family, optima, left_out)


def _fit_law(part: Part, runs: Runs, settings: Settings, progress: Progress | None) -> LawFit:
    kind, why_not = _LAWS[part]
    law = kind(runs.points, runs.loss)
    log_loss_N = np.log(runs.loss)
    problem = Problem(law, runs.points, settings.delta)
    best = problem.solve(log_loss_N, np.ones(len(runs)))
    draws = draw_runs(
        len(runs),
        settings.resamples,
        lambda drawn: why_not(runs.points.where(drawn)),
        _generator(settings, part),
    )
    no_intervals = draws if isinstance(draws, str) else None
    draws = [] if isinstance(draws, str) else draws
    watched = progress(draws, f"{law.title}: resampling") if progress else iter(draws)
    fits = [problem.resolve(log_loss_N, weights_N, best) for weights_N in watched]
    samples = [_with_split(law.coefficients(fit.x_P)) for fit in fits]
    coefficients = _with_split(law.coefficients(best.x_P))
    predicted = np.exp(law.log_loss(best.x_P, runs.points))
    unseen: tuple[Unseen, ...] = ("largest size", "largest budget")
    return LawFit(
        law,
        best.x_P,
        tuple(fit.x_P for fit in fits),
        coefficients,
        {name: interval_of([sample[name] for sample in samples], settings.level) for name in coefficients},
        no_intervals,
        best.converged,
        sum(not fit.converged for fit in fits),
        tuple(law.names[index] for index in best.at_bounds),
        predicted,
        float(np.abs(predicted / runs.loss - 1).mean()),
        {what: predict_unseen(kind, why_not, runs, what, settings.delta) for what in unseen},
    )


def _with_split(coefficients: dict[str, float]) -> dict[str, float]:
    """And ``a = beta / (alpha + beta)``, by which the best N grows with C where a token costs ``6 N``."""
    alpha, beta = coefficients["alpha"], coefficients["beta"]
    return {**coefficients, "a": beta / (alpha + beta)}


def _optima(
    runs: Runs, laws: dict[Part, LawFit], settings: Settings, left_out: dict[str, str]
) -> tuple[Family | None, list[Optimum]]:
    several_depths = len({row.mean_loops for row in runs.rows}) > 1
    fit = laws.get("looped") or (None if several_depths else laws.get("chinchilla"))
    family = family_of(runs) if fit is not None else "no law that knows the depths of these runs was fitted"
    if fit is None or isinstance(family, str):
        left_out["optimum"] = str(family)
        return None, []
    most = float(runs.flops.max())
    budgets = settings.budgets or (most, 10 * most)
    level, limit = settings.level, settings.most_parameters
    return family, [best_run(fit.law, fit.x_P, fit.resampled, family, each, level, limit) for each in budgets]


def _generator(settings: Settings, part: Part) -> np.random.Generator:
    """Its own for each part, so that leaving one out does not change another."""
    return np.random.default_rng([settings.seed, _STREAMS[part]])


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str) else asdict(value)
