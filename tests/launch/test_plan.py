"""The plan as a command: what it prints and writes, and what follows when something is changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plan import VARIANTS, main, slurm_gpus
from launch.planning.gpus import GPUS
from launch.planning.memory import plan_memory
from launch.planning.roofline import step_time
from launch.planning.run import PlannedRun, planned_run
from launch.planning.search import best, divides, evaluate, remedies, smallest_cluster, usable_bytes
from launch.settings import BadInputError, load_settings
from pretrain.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["h100"]


def run_of(name: str, ranks: int) -> PlannedRun:
    return planned_run(load_settings(TrainingConfig, ROOT / "configs" / f"{name}.json"), ranks, 2)


def test_the_command_prints_and_writes_a_whole_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["--config", str(ROOT / "configs" / "ice_1b.json"), "--gpus", "8", "--price", "2.5"]
    assert main([*arguments, "--json", str(json_file), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    for expected in ("core experts", "loop states", "expert payload", "tokens a day", "cost at 2.5", "It fits."):
        assert expected in printed
    assert "Fastest on 8" in printed
    assert "Smallest cluster" in printed
    plan = json.loads(json_file.read_text())
    assert plan["memory"]["total"] == pytest.approx(sum(plan["memory"]["by_kind"].values()))
    assert plan["step"]["seconds"] == pytest.approx(sum(plan["step"]["by_resource"].values()))
    assert plan["whole_run"]["cost"] == pytest.approx(2.5 * plan["whole_run"]["gpu_hours"])
    assert plan["best"]["step_seconds"] <= plan["step"]["seconds"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_size_fits_the_nodes_its_slurm_job_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--all", "--no-search"]) == 0
    printed = capsys.readouterr().out
    for name in VARIANTS:
        gpus = slurm_gpus(name)
        assert gpus is not None
        run = run_of(name, gpus)
        assert divides(run), name
        assert evaluate(run, H100) is not None, name
        assert name in printed


def test_a_cluster_that_cannot_run_it_is_refused_in_one_line() -> None:
    with pytest.raises(BadInputError, match="must divide the number of ranks, 3"):
        main(["--config", str(ROOT / "configs" / "ice_1b.json"), "--gpus", "3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "-8"], "--gpus -8: must be at least 1"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--price", "-3"], "--price -3: must be 0 or more, and finite"),
        (["--price", "nan"], "--price nan: must be 0 or more, and finite"),
        (["--price", "1e999"], "--price inf: must be 0 or more, and finite"),
        (["--json", "{folder}/none/plan.json"], "--json .*: there is no folder .*/none; make it first"),
        (["--json", "{folder}"], "--json .*: is a folder; name a file"),
        (["--picture", "{folder}/none/plan.png"], "--picture .*: there is no folder .*/none; make it first"),
        (["--json", "{folder}/" + "x" * 300], "xxx: File name too long; name another file"),
        (["--set", f"schedule.steps={10**400}"], "ice_1b.json: too large to plan"),
        (["--config", "{folder}/none.json"], "none.json: no such file"),
        (["--config", "{folder}"], "cannot be read as UTF-8 text"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    arguments = ["--config", str(ROOT / "configs" / "ice_1b.json"), "--no-search"]
    with pytest.raises(BadInputError, match=message) as refusal:
        main(arguments + [option.replace("{folder}", str(tmp_path)) for option in options])
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_a_price_of_nothing_is_a_price(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(ROOT / "configs" / "ice_1b.json"), "--no-search", "--price", "0"]) == 0
    assert "cost at 0 a GPU-hour" in capsys.readouterr().out


def test_each_remedy_does_make_it_fit() -> None:
    run = replace(run_of("ice_10b", 32), remat="none", remat_once=False, micro_batch_size=8)
    assert evaluate(run, H100) is None
    assert "loop.remat = loop" in " ".join(remedies(run, H100))


def test_a_run_that_trains_but_cannot_start_does_not_fit() -> None:
    """Without zero.Init every rank builds all but the others' experts, and moves it to its device whole."""
    run = replace(run_of("ice_500b", 1024), zero_init=False, expert_parallel_size=16)
    plan = plan_memory(run)
    assert plan.total < usable_bytes(H100) < plan.start_bytes
    assert evaluate(run, H100) is None
    assert "parallel.zero_init = true" in remedies(run, H100)
    assert plan_memory(replace(run, zero_init=True)).start_bytes < 0.25 * plan.start_bytes


def test_memory_does_not_grow_with_depth_but_for_the_states_of_loops_with_a_gradient() -> None:
    run = replace(run_of("ice_1b", 8), grad_loops=None, remat="loop")
    shallow, deep = (plan_memory(replace(run, max_loops=loops)).by_kind["loop states"] for loops in (16, 32))
    loops = [sum(kept for _, kept in replace(run, max_loops=n).loops_of_scales(n)) for n in (16, 32)]
    state = run.micro_tokens * run.model.dim * 2
    assert deep - shallow == (loops[1] - loops[0]) * state
    capped = replace(run, grad_loops=8)
    assert plan_memory(replace(capped, max_loops=64)).total == plan_memory(replace(capped, max_loops=32)).total


def test_more_of_anything_scarce_is_never_worse() -> None:
    run = run_of("ice_50b", 128)
    total = plan_memory(run).total
    assert total < plan_memory(replace(run, loss_chunk_tokens=None)).total
    assert plan_memory(replace(run, offload_optimizer=True)).total < total
    assert plan_memory(run_of("ice_50b", 256)).total < total
    assert step_time(run, GPUS["b200"]).seconds < step_time(run, H100).seconds
    found, small = best(run, H100), smallest_cluster(run, H100)
    assert found is not None
    assert found.time.seconds <= step_time(run, H100).seconds
    assert found.memory.total <= usable_bytes(H100)
    assert small is not None
    assert small.run.ranks <= run.ranks
