"""Members of a comparison are equal, or there is no comparison; and the shipped baselines are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.budget import main
from launch.comparison import Comparison, load_comparison, solve, solved_budgets
from launch.settings import BadInputError, load_settings
from launch.sweeping.grid import expand_grid
from launch.sweeping.settings import SweepSettings
from model.parameters import cache_bytes_per_token, count_parameters
from pretrain.config import TrainingConfig

ROOT = Path(__file__).parents[2]
BASELINES = sorted((ROOT / "configs" / "baselines").glob("*.json"))
FIXED = {"parallel.expert_parallel_size": 1, "loop.distribution": "fixed", "loop.max_loops": None}
UNLOOPED = {"model.max_loop_iters": 1, "loop.mean_loops": 1}
DENSE = {"model.n_experts": 0}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(key=value, ...)``: a comparison of a looped and a dense model of the demo's size."""

    def write_comparison(**changes: Any) -> Path:
        values = {
            "name": "c",
            "config": "configs/ice_tiny.json",
            "set": FIXED,
            "equal": "parameters",
            "reference": "looped",
            "members": {
                "looped": {},
                "dense": {"set": {**DENSE, **UNLOOPED}, "free": "model.ffn_dim", "multiple_of": 8},
            },
            **changes,
        }
        path = tmp_path / "comparison.json"
        path.write_text(json.dumps(values))
        return path

    return write_comparison


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_shipped_baseline_is_equal_by_the_models_own_count(path: Path) -> None:
    """FLOPs by the definition of a budget; parameters and KV bytes by building the models."""
    comparison = load_comparison(path)
    assert comparison.name == path.stem
    amounts = {}
    for name, (settings, budget) in solved_budgets(comparison, path).items():
        overrides = [f"{key}={json.dumps(value)}" for key, value in {**comparison.set, **settings}.items()]
        config = load_settings(TrainingConfig, ROOT / comparison.config, overrides)
        if comparison.equal == "parameters":
            amounts[name] = count_parameters(config.model).total
        elif comparison.equal == "kv_bytes":
            amounts[name] = cache_bytes_per_token(config.model, config.mean_loops) * config.data.sequence_length
        else:
            amounts[name] = budget.training_flops
    for name, amount in amounts.items():
        assert amount == pytest.approx(amounts[comparison.reference], rel=comparison.tolerance), name


def test_the_shipped_baselines_compare_what_they_should() -> None:
    members = {path.stem: solve(load_comparison(path), path) for path in BASELINES}
    assert {"flops", "parameters", "kv_bytes", "depth"} <= set(members)
    for name in ("flops", "parameters", "kv_bytes"):
        assert {"dense", "moe", "looped_dense", "looped_moe"} <= set(members[name]), name
    depths = [(size["model.recurrent_layers"], size["loop.mean_loops"]) for size in members["depth"].values()]
    assert depths == [(2, 4), (4, 2), (8, 1)]  # k layers looped L times against k L layers


def test_a_free_setting_takes_the_nearest_value(write: Callable[..., Path]) -> None:
    path = write()
    comparison = load_comparison(path)
    solved = solved_budgets(comparison, path)
    chosen = solved["dense"][0]["model.ffn_dim"]
    assert isinstance(chosen, int)
    assert chosen % 8 == 0
    wanted = solved["looped"][1].parameters

    def distance(ffn_dim: int) -> int:
        overrides = [f"{key}={json.dumps(value)}" for key, value in {**FIXED, **DENSE, **UNLOOPED}.items()]
        config = load_settings(TrainingConfig, ROOT / "configs/ice_tiny.json", [*overrides, f"model.ffn_dim={ffn_dim}"])
        return abs(count_parameters(config.model).total - wanted)

    assert distance(chosen) == min(distance(value) for value in (chosen - 8, chosen, chosen + 8))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"members": {"looped": {}, "dense": {"set": {**DENSE, **UNLOOPED}}}}, "members.dense: parameters = "),
        ({"members": {"looped": {}, "dense": {"set": DENSE, "free": "model.ffn_dim", "multiple_of": 4096}}}, "beyond"),
        ({"reference": "dense"}, 'members.dense.free = "model.ffn_dim": the reference is fixed'),
        ({"reference": "moe"}, 'reference = "moe": is no member; accepted: looped, dense'),
        ({"members": {"looped": {}, "d": {"free": "schedule.steps"}}}, "steps do not change parameters"),
        ({"members": {"looped": {}}}, "members = "),
        ({"equal": "seconds"}, 'equal = "seconds"'),
    ],
)
def test_a_comparison_that_is_none_is_refused_in_one_line(
    write: Callable[..., Path], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(BadInputError, match=re.escape(expected)):
        main([str(write(**changes))])


def test_sampled_depth_makes_flops_unequal_between_seeds_and_is_noticed(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    """Steps chosen for one seed do not fit another one's draws, so a sweep over seeds is refused."""
    members = {"looped": {}, "unlooped": {"set": UNLOOPED, "free": "schedule.steps"}}
    short = {"schedule.steps": 60, "loop.distribution": "poisson"}
    comparison = write(equal="training_flops", members=members, set={**FIXED, **short}, tolerance=0.005)
    assert isinstance(load_comparison(comparison), Comparison)
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"name": "s", "comparison": str(comparison), "seeds": [0]}))
    cells = expand_grid(load_settings(SweepSettings, path), path)
    assert [cell.size for cell in cells] == ["looped", "unlooped"]
    assert cells[0].budget.training_flops == pytest.approx(cells[1].budget.training_flops, rel=0.005)
    path.write_text(json.dumps({"name": "s", "comparison": str(comparison), "seeds": [0, 1, 2, 3]}))
    with pytest.raises(BadInputError, match=r"members.unlooped: training_flops = .* beyond tolerance"):
        expand_grid(load_settings(SweepSettings, path), path)


def test_a_sweep_of_a_comparison_decides_nothing_of_it(write: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    for key, value in {"tokens": [1000], "config": "c.json", "mean_loops": [2], "sizes": {"a": {}}}.items():
        path.write_text(json.dumps({"name": "s", "comparison": str(write()), key: value}))
        with pytest.raises(BadInputError, match=rf"{key} = .*: the comparison decides it"):
            load_settings(SweepSettings, path)
    path.write_text(json.dumps({"name": "s", "sizes": {"a": {}}}))
    with pytest.raises(BadInputError, match=r"config = .*: is needed, or comparison"):
        load_settings(SweepSettings, path)


def test_the_table_shows_what_was_chosen(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write())]) == 0
    output = capsys.readouterr().out
    assert "model.ffn_dim = " in output
    assert "c: equal parameters within 1.0% of looped" in output
