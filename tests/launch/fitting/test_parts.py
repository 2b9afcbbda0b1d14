"""Parabolas, depth series, held-out errors, optima: each against what is known of it otherwise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from synthetic import LAW, LEVELS, WIDTHS, isoflop_rows, looped_loss, make_row, parameters_of, token_flops

from launch.fitting.chinchilla import Chinchilla, why_not_chinchilla
from launch.fitting.depth import DepthSeries, depth_series, fit_depth
from launch.fitting.holdout import HeldOut, predict_unseen
from launch.fitting.isoflop import fit_parabolas
from launch.fitting.looped import Looped, why_not_looped
from launch.fitting.optimum import Family, best_run, family_of
from launch.fitting.runs import Floats, ResultRow, Runs, as_runs


def runs_of(rows: list[dict[str, Any]]) -> Runs:
    return as_runs([ResultRow.model_validate(row) for row in rows], "active", "nats")


def coordinates(law: Chinchilla, coefficients: dict[str, float]) -> Floats:
    """The law's own coordinates of written coefficients."""
    c = coefficients
    x = [math.log(c["E"]), math.log(c["A"]) - c["alpha"] * law.log_N0, c["alpha"]]
    x += [math.log(c["B"]) - c["beta"] * law.log_D0, c["beta"]]
    return np.array(x + ([c["phi"]] if isinstance(law, Looped) else []))


def test_a_parabolas_minimum_is_found_and_one_outside_is_not_believed() -> None:
    rows = []
    for level, best in ((1e16, 3e6), (1e17, 9.486833e6), (1e18, 1e9)):
        for width in WIDTHS:
            size = sum(parameters_of(width))
            loss = 4 + 0.2 * math.log(size / best) ** 2
            rows.append(make_row(width, 2, level / token_flops(width, 2), loss, flops_level=level))
    parabolas, growth = fit_parabolas(runs_of(rows), 50, 0.95, np.random.default_rng(0))
    assert [parabola.inside for parabola in parabolas] == [True, True, False]
    assert [parabola.best_parameters for parabola in parabolas[:2]] == pytest.approx([3e6, 9.486833e6], rel=1e-6)
    assert [parabola.best_loss for parabola in parabolas[:2]] == pytest.approx([4, 4])
    tokens = parabolas[0].best_tokens
    assert tokens is not None
    sizes = {sum(parameters_of(width)): 1e16 / token_flops(width, 2) for width in WIDTHS}
    around = [sizes[size] for size in (min(s for s in sizes if s > 3e6), max(s for s in sizes if s < 3e6))]
    assert around[0] < tokens < around[1]
    assert parabolas[2].interval is None
    # N grew by the square root of ten while C grew by ten; the third level does not count.
    assert len(growth) == 1
    assert (growth[0].levels, growth[0].exponent) == (2, pytest.approx(0.5, abs=1e-6))
    assert growth[0].interval is not None
    assert growth[0].interval.low == pytest.approx(growth[0].interval.high)  # without noise


def test_three_runs_meet_any_parabola_and_so_have_no_interval() -> None:
    rows = isoflop_rows(looped_loss(), noise=0.002, widths=WIDTHS[:3], levels=[1e15], depths=[1])
    (parabola,), growth = fit_parabolas(runs_of(rows), 50, 0.95, np.random.default_rng(0))
    assert parabola.inside
    assert parabola.interval is None
    assert growth == []


def test_a_depth_series_gives_back_its_law() -> None:
    loops = (1, 2, 3, 4, 6, 8, 12, 16)
    generator = np.random.default_rng(3)
    known = {"L_inf": 3.2, "Z": 0.9, "z": 0.45}
    losses = tuple(
        (known["L_inf"] + known["Z"] * math.exp(-known["z"] * T)) * math.exp(generator.normal(0, 5e-4)) for T in loops
    )
    fit = fit_depth(DepthSeries("cell", "test", 4, loops, losses), 100, 0.95, generator)
    assert fit.converged
    for name, value in known.items():
        assert fit.coefficients[name] == pytest.approx(value, rel=0.05)
        interval = fit.intervals[name]
        assert interval is not None
        assert interval.holds(value), name
        assert interval.high - interval.low < 0.2 * value
    assert fit.worst_error < 0.002
    # From there on the excess is below 0.1% of L_inf, and before it is not.
    excess = fit.predict(np.array([fit.enough_loops - 0.1, fit.enough_loops + 0.1])) / fit.coefficients["L_inf"] - 1
    assert excess[0] > 0.001 > excess[1]


def test_a_loss_that_rises_with_depth_is_no_saturation_and_shows() -> None:
    series = DepthSeries("cell", "test", 2, (1, 2, 4, 8, 16), (4.0, 3.5, 3.6, 3.9, 4.4))
    fit = fit_depth(series, 0, 0.95, np.random.default_rng(0))
    assert fit.worst_error > 0.05
    assert fit.intervals == {"L_inf": None, "Z": None, "z": None}


def test_series_of_depths_do_not_mix_models_sizes_or_budgets() -> None:
    by_loops = {str(T): {"validation_loss": 4 + 1 / T, "bits_per_byte": 2 + 1 / T} for T in (8, 1, 2, 4)}
    rows = [make_row(128, T, 1e8 + T, 4 + 1 / T, seed) for T in (1, 2, 4, 8) for seed in (0, 1)]
    rows += [make_row(128, T, 5e8, 4.0) for T in (1, 2, 4)]  # too few depths at this budget
    rows += [make_row(192, 8, 1e8, 4.0, by_loops=by_loops)]
    rows += [make_row(192, 4, 1e8, 4.0, by_loops={key: by_loops[key] for key in ("1", "2", "4")})]
    of_model, of_size = depth_series([ResultRow.model_validate(row) for row in rows], "bits")
    assert (of_model.kind, of_model.trained_loops) == ("test", 8)
    assert (of_model.loops, of_model.loss) == ((1, 2, 4, 8), (3.0, 2.5, 2.25, 2.125))
    assert (of_size.kind, of_size.trained_loops, of_size.loops) == ("training", None, (1, 1, 2, 2, 4, 4, 8, 8))
    assert of_size.name.startswith("d128, 100,000,0")


def test_the_right_law_predicts_the_largest_runs_and_the_wrong_one_does_not() -> None:
    runs = runs_of(isoflop_rows(looped_loss(), noise=0.002, seed=1))
    for what in ("largest size", "largest budget"):
        right = predict_unseen(Looped, why_not_looped, runs, what, 1e-3)
        wrong = predict_unseen(Chinchilla, why_not_chinchilla, runs, what, 1e-3)
        assert isinstance(right, HeldOut)
        assert isinstance(wrong, HeldOut)
        assert right.runs + right.trained_on == wrong.runs + wrong.trained_on == len(runs)
        assert right.runs == (12 if what == "largest size" else 20)
        assert right.mean_error < 0.006
        assert wrong.mean_error > 3 * right.mean_error
        assert right.worst_error >= right.mean_error >= abs(right.bias)


def test_what_is_held_out_is_not_seen() -> None:
    rows = isoflop_rows(looped_loss())
    for row in rows:
        if row["size"] == f"d{WIDTHS[-1]}":
            row["validation_loss"] *= 1.1
    result = predict_unseen(Looped, why_not_looped, runs_of(rows), "largest size", 1e-3)
    assert isinstance(result, HeldOut)
    assert result.bias == pytest.approx(1 / 1.1 - 1, abs=2e-3)
    few = runs_of(isoflop_rows(looped_loss(), widths=WIDTHS[:3]))
    assert "2 different numbers of parameters" in str(
        predict_unseen(Chinchilla, why_not_chinchilla, few, "largest size", 1e-3)
    )


def test_the_optimum_is_hoffmanns_where_a_token_costs_6_N() -> None:
    rows = []
    for width in WIDTHS:
        size = sum(parameters_of(width))
        rows += [make_row(width, 1, tokens, 4.0, training_flops=6.0 * size * tokens) for tokens in (10**8, 10**9)]
    runs = runs_of(rows)
    family = family_of(runs)
    assert isinstance(family, Family)
    assert family.misfit < 1e-9
    law = Chinchilla(runs.points, runs.loss)
    alpha, beta = LAW["alpha"], LAW["beta"]
    for budget in (1e16, 1e19):
        best = best_run(law, coordinates(law, LAW), [], family, budget, 0.95)
        balance = (alpha * LAW["A"] / (beta * LAW["B"])) ** (1 / (alpha + beta))
        assert best.parameters == pytest.approx(balance * (budget / 6) ** (beta / (alpha + beta)), rel=2e-3)
        assert best.tokens == pytest.approx(budget / 6 / best.parameters, rel=1e-6)
        written = LAW["E"] + LAW["A"] * best.parameters**-alpha + LAW["B"] * best.tokens**-beta
        assert best.loss == pytest.approx(written)
        assert best.loops == 1
    assert any("times the most measured" in edge for edge in best.edges)


@pytest.mark.parametrize("phi", [0.45, 1.4])
def test_the_optimum_over_depth_is_the_least_of_all_runs_that_could_be_made(phi: float) -> None:
    """Below 1 the loops' FLOPs are better spent on parameters; above 1 on loops, which then win at any size."""
    loss = looped_loss({**LAW, "phi": phi})
    runs = runs_of(isoflop_rows(loss))
    family = family_of(runs)
    assert isinstance(family, Family)
    assert family.depths == tuple(range(1, 9))
    assert family.trained_depths == (1, 2, 4, 8)
    assert family.misfit < 0.03
    law = Looped(runs.points, runs.loss)
    budget = LEVELS[1]
    best = best_run(law, coordinates(law, {**LAW, "phi": phi}), [], family, budget, 0.95)
    assert best.loops == (1 if phi < 1 else 8)
    assert any("loops at the" in edge for edge in best.edges)
    # Every width, in steps of a hundredth, at every depth.
    widths = [128 * 1.01**step for step in range(-100, 250)]
    tried = {}
    for T in (1, 2, 4, 8):
        for width in widths:
            once, recurrent = 24 * width**2 + 200 * width, 40 * width**2
            tokens = budget / (6 * (once + T * recurrent + 4096 * width))
            tried[loss(once, recurrent, T, tokens), once + recurrent] = T
    (least, size), depth = min(tried.items())
    assert best.loops == depth
    assert best.loss == pytest.approx(least, rel=3e-3)
    assert best.parameters == pytest.approx(size, rel=0.1)
    assert [at.loops for at in best.at_depths] == [1, 2, 4, 8]
    assert min(at.loss for at in best.at_depths) == best.loss


def test_a_limit_on_parameters_makes_depth_pay() -> None:
    runs = runs_of(isoflop_rows(looped_loss()))
    family = family_of(runs)
    assert isinstance(family, Family)
    law = Looped(runs.points, runs.loss)
    free = best_run(law, coordinates(law, LAW), [], family, 1e19, 0.95)
    bound = best_run(law, coordinates(law, LAW), [], family, 1e19, 0.95, most_parameters=1e7)
    assert free.loops == 1
    assert bound.loops > 1
    assert bound.parameters <= 1e7 * (1 + 1e-9)
    assert "parameters at their limit" in bound.edges
    assert bound.loss > free.loss


def test_a_family_is_not_read_from_what_does_not_show_it() -> None:
    assert "one size only" in str(family_of(runs_of(isoflop_rows(looped_loss(), widths=[128]))))
    rows = [row for row in isoflop_rows(looped_loss()) if (row["size"] == "d128") == (row["mean_loops"] == 1)]
    rows = [row for row in rows if row["mean_loops"] in (1, 2)]  # each size at one depth
    assert "fewer than two sizes have several depths" in str(family_of(runs_of(rows)))
