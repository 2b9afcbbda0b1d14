"""The laws: their formulas and derivatives, and that fitting finds what made the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize
from synthetic import DEPTHS, LAW, isoflop_rows, looped_loss

from launch.fitting.chinchilla import Chinchilla, why_not_chinchilla
from launch.fitting.depth import Saturating
from launch.fitting.huber import DELTA, Fit, Law, Problem
from launch.fitting.looped import Looped, why_not_looped
from launch.fitting.runs import Points, ResultRow, Runs, as_runs


def runs_of(rows: list[dict[str, Any]]) -> Runs:
    return as_runs([ResultRow.model_validate(row) for row in rows], "active", "nats")


def fit_of(law: Law[Points], runs: Runs) -> Fit:
    return Problem(law, runs.points).solve(np.log(runs.loss), np.ones(len(runs)))


def huber_cost(law: Law[Points], x_P: Any, runs: Runs) -> float:
    """Huber's loss as textbooks write it, in units of delta^2."""
    total = 0.0
    for error in law.log_loss(np.asarray(x_P), runs.points) - np.log(runs.loss):
        size = abs(error)
        total += 0.5 * size**2 if size <= DELTA else DELTA * (size - 0.5 * DELTA)
    return total / DELTA**2


def laws_of(runs: Runs) -> list[tuple[Law[Any], Any]]:
    depths = np.array([1.0, 2.0, 4.0, 8.0])
    return [
        (Chinchilla(runs.points, runs.loss), runs.points),
        (Looped(runs.points, runs.loss), runs.points),
        (Saturating(depths, 3 + np.exp(-depths)), depths),
    ]


def test_derivatives_are_those_of_the_law() -> None:
    generator = np.random.default_rng(0)
    for law, points in laws_of(runs_of(isoflop_rows(looped_loss(), levels=[1e16], depths=[1, 4]))):
        lower, upper = np.array(law.bounds).T
        grid_GP = law.grid()
        for x_P in grid_GP[generator.choice(len(grid_GP), 10, replace=False)]:
            x_P = np.clip(x_P, lower + 0.01, upper - 0.01)
            log_loss_N, slope_NP = law.gradient(x_P, points)
            np.testing.assert_allclose(log_loss_N, law.log_loss(x_P, points), rtol=1e-13)
            np.testing.assert_allclose(slope_NP, approx_fprime(x_P, law.log_loss, 1e-7, points), atol=2e-5)


def test_coefficients_are_those_of_the_written_formula() -> None:
    runs = runs_of(isoflop_rows(looped_loss(), levels=[1e16]))
    points = runs.points
    for law, x_P in (
        (Chinchilla(points, runs.loss), np.array([0.5, -0.3, 0.4, 0.2, 0.25])),
        (Looped(points, runs.loss), np.array([0.5, -0.3, 0.4, 0.2, 0.25, 0.6])),
    ):
        c = law.coefficients(x_P)
        effective = points.once + points.loops ** c.get("phi", 0.0) * points.recurrent
        written = c["E"] + c["A"] * effective ** -c["alpha"] + c["B"] * points.tokens ** -c["beta"]
        np.testing.assert_allclose(law.log_loss(x_P, points), np.log(written), rtol=1e-12)
    depths = np.array([2.0, 3.0, 9.0])
    saturating = Saturating(depths, np.array([4.0, 3.5, 3.2]))
    c = saturating.coefficients(np.array([1.1, -0.7, -0.5]))
    written = c["L_inf"] + c["Z"] * np.exp(-c["z"] * depths)
    np.testing.assert_allclose(saturating.log_loss(np.array([1.1, -0.7, -0.5]), depths), np.log(written), rtol=1e-12)


def test_exact_losses_give_back_the_law_that_made_them() -> None:
    runs = runs_of(isoflop_rows(looped_loss()))
    law = Looped(runs.points, runs.loss)
    fit = fit_of(law, runs)
    assert fit.converged
    assert fit.at_bounds == ()
    found = law.coefficients(fit.x_P)
    for name, value in LAW.items():
        assert found[name] == pytest.approx(value, rel=0.02), name
    # One depth: Chinchilla's law is exact, its A that of the effective parameters' share.
    runs = runs_of(isoflop_rows(looped_loss({**LAW, "phi": 0.0}), depths=[2]))
    law = Chinchilla(runs.points, runs.loss)
    found = law.coefficients(fit_of(law, runs).x_P)
    for name in Chinchilla.names:
        assert found[name] == pytest.approx(LAW[name], rel=0.02), name


def test_a_fit_is_where_no_other_method_finds_less() -> None:
    """Nelder and Mead's simplex knows no derivatives and no starts of ours."""
    runs = runs_of(isoflop_rows(looped_loss(), noise=0.005, levels=[1e16, 1e17], seed=4))
    for law in (Chinchilla(runs.points, runs.loss), Looped(runs.points, runs.loss)):
        fit = fit_of(law, runs)
        assert fit.objective == pytest.approx(huber_cost(law, fit.x_P, runs))
        options = {"maxfev": 600, "xatol": 1e-9, "fatol": 1e-9}
        other = minimize(lambda x, law=law: huber_cost(law, x, runs), fit.x_P, method="Nelder-Mead", options=options)
        assert fit.objective <= other.fun * (1 + 1e-5)


def test_a_diverged_run_does_not_decide() -> None:
    rows = isoflop_rows(looped_loss())
    clean = runs_of(rows)
    rows[7]["validation_loss"] *= 1.5
    rows[30]["validation_loss"] *= 1.3
    found = []
    for runs in (clean, runs_of(rows)):
        law = Looped(runs.points, runs.loss)
        found.append(np.exp(law.log_loss(fit_of(law, runs).x_P, clean.points)))
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)


def test_loops_are_worth_what_the_law_says() -> None:
    """``T^phi N_rec``: at phi = 1 four loops equal four cores, at phi = 0 one."""
    runs = runs_of(isoflop_rows(looped_loss(), levels=[1e16]))
    law = Looped(runs.points, runs.loss)
    x_P = np.array([0.5, -0.3, 0.4, 0.2, 0.25, 1.0])
    looped = Points(np.array([1e6]), np.array([2e6]), np.array([4.0]), np.array([1e8]))
    unrolled = Points(np.array([1e6]), np.array([8e6]), np.array([1.0]), np.array([1e8]))
    np.testing.assert_allclose(law.log_loss(x_P, looped), law.log_loss(x_P, unrolled))
    x_P[5] = 0.0
    once = Points(np.array([1e6]), np.array([2e6]), np.array([1.0]), np.array([1e8]))
    np.testing.assert_allclose(law.log_loss(x_P, looped), law.log_loss(x_P, once))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            isoflop_rows(looped_loss(), widths=[128, 192, 256], levels=[1e16], depths=[1]),
            "3 runs; it has 5 coefficients",
        ),
        (isoflop_rows(looped_loss(), widths=[128], depths=[1, 2, 4, 8]), "1 different number of parameters"),
        (isoflop_rows(looped_loss(), widths=[128, 256], depths=[1, 2, 4, 8]), "2 different numbers of parameters"),
        (isoflop_rows(looped_loss(), widths=[64, 96, 128, 192, 256, 384], levels=[1e16], depths=[1]), "one FLOP level"),
    ],
    ids=["few", "one size", "two sizes", "one level"],
)
def test_points_that_do_not_tell_the_coefficients_apart_are_refused(rows: list[dict[str, Any]], reason: str) -> None:
    points = runs_of(rows).points
    assert reason in (why_not_chinchilla(points) or "nothing against it")
    assert why_not_looped(points) == why_not_chinchilla(points)


def test_depth_must_vary_by_itself_for_its_worth_to_be_told() -> None:
    one_depth = runs_of(isoflop_rows(looped_loss(), depths=[2])).points
    assert why_not_chinchilla(one_depth) is None
    assert "all runs have 2 mean loops" in (why_not_looped(one_depth) or "")
    # The wider, the deeper.
    rows = [row for row in isoflop_rows(looped_loss()) if row["size"] == f"d{128 * row['mean_loops']}"]
    rows += [{**row, "tokens": 2 * row["tokens"], "config_hash": f"{row['config_hash']}2"} for row in rows]
    tied = runs_of(rows).points
    assert len(set(tied.loops)) == len([depth for depth in DEPTHS if 128 * depth in (128, 256, 512)])
    assert why_not_chinchilla(tied) is None
    assert "the depth follows from parameters" in (why_not_looped(tied) or "")


def test_a_bound_that_stopped_a_coefficient_is_reported() -> None:
    """Losses without any irreducible part: E has no value to find."""
    runs = runs_of(isoflop_rows(looped_loss({**LAW, "E": 1e-9}), depths=[1]))
    law = Chinchilla(runs.points, runs.loss)
    fit = fit_of(law, runs)
    assert fit.at_bounds == (0,)
    assert math.exp(fit.x_P[0]) < 0.01
