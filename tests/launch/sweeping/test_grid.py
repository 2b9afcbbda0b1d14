"""The cells of a grid: names, budgets, and what is refused before anything starts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sweep import STEPS, base_settings

from launch.settings import BadInputError, load_settings
from launch.sweeping.grid import Cell, expand_grid
from launch.sweeping.settings import SweepSettings
from model import IceModel
from model.parameters import count_parameters, training_flops_per_token
from pretrain.loop_depth import sample_loops

ROOT = Path(__file__).parents[3]
WriteSweep = Callable[..., Path]


def cells_of(path: Path) -> list[Cell]:
    return expand_grid(load_settings(SweepSettings, path), path)


def test_every_point_of_the_grid_is_a_cell_of_its_own(write_sweep: WriteSweep) -> None:
    cells = cells_of(write_sweep(tokens=[25600, 51200], mean_loops=[1, 3], seeds=[0, 7], warmup_fraction=0.1))
    assert len(cells) == len({cell.name for cell in cells}) == 16
    assert cells[0].name == "t25.6k-d16-r1-s0"
    assert cells[-1].name == "t51.2k-d24-r3-s7"
    last = cells[-1].config
    assert (last.run.seed, last.model.dim, last.mean_loops, last.model.max_loop_iters) == (7, 24, 3, 3)
    assert (last.schedule.steps, last.schedule.warmup_steps) == (400, 40)
    assert last.loop.max_loops is None
    assert last.logging.wandb_group == "small"
    assert cells[-1].budget.tokens == 51200


def test_a_cells_name_stays_when_the_grid_grows(write_sweep: WriteSweep) -> None:
    before = {cell.name for cell in cells_of(write_sweep(tokens=[25600], mean_loops=[2]))}
    after = {cell.name for cell in cells_of(write_sweep(tokens=[25600, 12800], mean_loops=[1, 2], seeds=[0, 1]))}
    assert before < after


def test_without_tokens_a_cell_trains_for_the_steps_of_its_configuration(write_sweep: WriteSweep) -> None:
    assert [(cell.name, cell.steps) for cell in cells_of(write_sweep())] == [("d16-s0", STEPS), ("d24-s0", STEPS)]


def test_cells_of_an_isoflop_level_execute_the_same_flops(write_sweep: WriteSweep) -> None:
    path = write_sweep(flops=[4e9, 8e9], mean_loops=[1, 2, 5], seeds=[0, 1], warmup_fraction=0.1)
    cells = cells_of(path)
    assert {cell.flops_level for cell in cells} == {4e9, 8e9}
    for cell in cells:
        assert cell.flops_level is not None
        assert cell.budget.training_flops == pytest.approx(cell.flops_level, rel=0.01)
        drawn = [sample_loops(cell.config.loop, cell.mean_loops, cell.seed, step + 1) for step in range(cell.steps)]
        assert cell.budget.executed_loops == pytest.approx(sum(drawn) / cell.steps)
    deep = next(cell for cell in cells if cell.name == "c4e9-d16-r5-s0")
    shallow = next(cell for cell in cells if cell.name == "c4e9-d16-r1-s0")
    assert deep.budget.tokens < shallow.budget.tokens
    assert deep.budget.parameters == shallow.budget.parameters


def test_a_budget_is_the_models_own_count(write_sweep: WriteSweep, small_data: Path) -> None:
    base = base_settings(small_data) | {"loop": {"distribution": "fixed", "mean_loops": 3, "remat": "loop"}}
    for cell in cells_of(write_sweep(base)):
        model, budget = cell.config.model, cell.budget
        count = count_parameters(model)
        assert (budget.parameters, budget.active_parameters) == (count.total, count.active)
        tables = 2 * model.vocab_size * model.dim
        assert budget.non_embedding_parameters == count.total - tables
        assert budget.once_parameters + budget.recurrent_parameters == count.total - tables
        assert budget.once_parameters + budget.active_recurrent_parameters == count.active - tables
        # It counts a causal query's keys as S / 2, and norms' weights as if they were matrices.
        other = training_flops_per_token(model, 3, context=32) * budget.tokens
        assert budget.training_flops == pytest.approx(other, rel=0.05)
        assert budget.recomputed_flops > 0.1 * budget.training_flops
        # Prelude, coda and each of 3 loops: keys and values of 2 heads, in 16 bits, for 32 tokens.
        assert budget.kv_bytes == 5 * 2 * model.dim * 2 * 32


def test_parameters_that_loop_are_those_of_the_models_core(write_sweep: WriteSweep, small_data: Path) -> None:
    base = base_settings(small_data)
    base["model"] |= {"msrd_scales": [1, 2], "lora_rank": 4, "slu": True}
    base["loop"] |= {"min_loops": 2}
    for cell in cells_of(write_sweep(base)):
        with torch.device("meta"):
            model = IceModel(cell.config.model)
        sizes = {name: weight.numel() for name, weight in model.named_parameters()}
        looped = sum(size for name, size in sizes.items() if name.startswith("core.scales."))
        unused = sum(
            weight.numel() // 2  # 2 of 4 experts
            for name, weight in model.named_parameters()
            if ".experts." in name and weight.dim() == 3
        )
        heads = sum(size for name, size in sizes.items() if name.startswith("depth_heads."))
        tables = 2 * cell.config.model.vocab_size * cell.config.model.dim
        assert cell.budget.recurrent_parameters == looped
        assert cell.budget.active_recurrent_parameters == looped - unused
        assert cell.budget.once_parameters == sum(sizes.values()) - looped - heads - tables


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "scaling").glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_sweep_is_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cells = cells_of(path)
    total = sum(cell.budget.training_flops for cell in cells)
    if path.stem == "ice_small":
        assert len(cells) >= 24
        # The demo's two cores do 1.6e13 in 8 minutes: three hours are 3.6e14, and small models are slower.
        assert total < 2e14
        assert all(cell.budget.tokens < 6_279_834 for cell in cells), "more than one epoch of the demo's corpus"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"flops": [1e9], "tokens": [1000]}, "flops = [1000000000.0]: FLOPs decide the tokens"),
        ({"mean_loops": [2, 2]}, "mean_loops = [2, 2]: has 2 twice"),
        ({"sizes": {"a": {"run.seed": 3}}}, "sizes.a.run.seed = 3: the sweep decides it"),
        ({"sizes": {"a": {"model.dimm": 3}}}, "cell a-s0: model.dimm = 3: unknown key; did you mean dim?"),
        ({"sizes": {"a": {"model.dim": 17}}}, "cell a-s0: model"),
        ({"sizes": {}}, "sizes = {}"),
        ({"tokens": [150]}, "cell t150-d16-s0: schedule.warmup_steps = 3: must be below steps = 1"),
        ({"tokens": [150], "warmup_fraction": 0.1}, "tokens = 150: 1 steps of a whole batch make 128, off by more"),
        ({"ranks": 3}, "parallel.micro_batch_size x ranks = 2 x 3"),
        ({"set": {"data.stages": [{"from_tokens": 0}]}}, "data.stages: a budget is counted for runs without"),
        ({"config": "nowhere.json"}, "nowhere.json: no such file"),
        ({"parallell": 2}, "did you mean parallel?"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(write_sweep: WriteSweep, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(expected)):
        cells_of(write_sweep(**changes))
