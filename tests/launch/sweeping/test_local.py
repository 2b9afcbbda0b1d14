"""Cells as processes: skipped, resumed, refused, given up, stopped; and one file of results.

Training is a stand-in here; the real one is in ``tests/multirank/test_sweep.py``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_sweep import base_settings

from launch.settings import BadInputError
from launch.sweep import load_sweep, main
from launch.sweeping import local
from launch.sweeping.folder import LOCK, PLAN
from launch.sweeping.local import training_command
from pretrain import evaluate

WriteSweep = Callable[..., Path]
StandIn = Callable[..., None]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / "small" / "results.jsonl").read_text().splitlines()]


def starts_of(folder: Path) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in folder.glob("runs/small/*/starts")}


def test_every_cell_is_trained_and_the_results_say_what_came_of_it(
    write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(d24_s0=["crash", "crash"], d16_s1=["lie"])
    path = write_sweep(seeds=[0, 1], parallel=2)
    assert main([str(path)]) == 0
    assert starts_of(tmp_path) == {"d16-s0": 1, "d16-s1": 2, "d24-s0": 3, "d24-s1": 1}
    output = capsys.readouterr().out
    assert "d24-s0: goes on from step 10" in output
    assert "4 finished; 100% of" in output
    rows = rows_of(tmp_path)
    assert [row["cell"] for row in rows] == ["d16-s0", "d16-s1", "d24-s0", "d24-s1"]  # the grid's order
    row = rows[2]
    assert (row["size"], row["seed"], row["mean_loops"], row["steps"], row["tokens"]) == ("d24", 0, 2, 20, 2560)
    assert (row["validation_loss"], row["bits_per_byte"], row["seconds"]) == (4.5, 2.5, 10.0)
    assert row["train_loss"] == pytest.approx((4.80 + 4.81) / 2)  # of the last tenth of the steps
    assert row["parameters"]["total"] == row["budget"]["parameters"] > rows[0]["parameters"]["total"]
    assert set(row["versions"]) == {"python", "torch", "deepspeed", "commit"}
    assert len({row["config_hash"] for row in rows}) == 4
    assert row["data"] == rows[0]["data"] != {}


def test_a_finished_cell_is_not_trained_again(write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path) -> None:
    stand_in(d24_s0=["refuse"])
    path = write_sweep()
    assert main([str(path)]) == 78
    rows = rows_of(tmp_path)
    (tmp_path / "runs" / "small" / "results.jsonl").unlink()
    assert main([str(path), "--collect"]) == 0
    assert rows_of(tmp_path) == rows
    assert main([str(path)]) == 0
    assert starts_of(tmp_path) == {"d16-s0": 1, "d24-s0": 2}
    assert rows_of(tmp_path)[0] == rows[0]
    assert len(rows_of(tmp_path)) == 2


def test_refused_and_hopeless_cells_do_not_keep_the_others_from_finishing(
    write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(d16_s0=["refuse"], d24_s0=["crash", *["stuck"] * 9])
    path = write_sweep(seeds=[0, 1], retries=1)
    assert main([str(path)]) == 78
    assert starts_of(tmp_path) == {"d16-s0": 1, "d16-s1": 1, "d24-s0": 3, "d24-s1": 1}
    output = capsys.readouterr().out
    assert "d16-s0: refused, not tried again: error: the vocabulary is wrong" in output
    assert "d24-s0: ended with status 1, no newer checkpoint in 2 starts; given up: Traceback: no memory" in output
    assert [row["cell"] for row in rows_of(tmp_path)] == ["d16-s1", "d24-s1"]
    stand_in(d24_s0=["stuck"] * 9)
    assert main([str(path)]) == 1  # d16-s0 finishes now


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_asked_to_stop_the_cells_save_and_the_same_command_goes_on(
    write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path, number: signal.Signals
) -> None:
    stand_in(d16_s0=["hold"], d24_s0=["hold"])
    path = write_sweep(seeds=[0, 1], parallel=2)
    handler = signal.getsignal(number)

    def interrupt() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and len(list(tmp_path.glob("runs/small/*/holding"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main([str(path)]) == 75
    thread.join()
    assert (tmp_path / "runs/small/d16-s0/checkpoints/step_00000007/manifest.json").exists()
    assert main([str(path)]) == 0
    assert len(rows_of(tmp_path)) == 4
    assert signal.getsignal(number) is handler


def test_a_cell_whose_meaning_would_change_is_refused(
    write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path, small_data: Path
) -> None:
    stand_in()
    assert main([str(write_sweep())]) == 0
    base = base_settings(small_data)
    unimportant = base | {"checkpoint": {"every": 7}, "logging": {"wandb_project": "other"}}
    assert main([str(write_sweep(unimportant, seeds=[0, 1]))]) == 0  # more cells, other saves
    assert starts_of(tmp_path) == {"d16-s0": 1, "d24-s0": 1, "d16-s1": 1, "d24-s1": 1}
    base["optim"]["lr"] = 0.02
    with pytest.raises(BadInputError, match=r"cell d16-s0: optim.lr = 0.02: .*/d16-s0 was begun with 0.01; give the"):
        main([str(write_sweep(base))])
    with pytest.raises(BadInputError, match=r"cell d24-s0: model.dim = 32: .* was begun with 24"):
        main([str(write_sweep(sizes={"d16": {}, "d24": {"model.dim": 32}}))])
    assert sum(starts_of(tmp_path).values()) == 4


def test_another_run_is_not_taken_for_a_cell(write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path) -> None:
    stand_in()
    (tmp_path / "runs/small/d16-s0/checkpoints/step_00000005").mkdir(parents=True)
    with pytest.raises(BadInputError, match="is no cell of a sweep"):
        main([str(write_sweep())])


def test_missing_data_is_found_before_anything_starts(write_sweep: WriteSweep, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="nowhere"):
        main([str(write_sweep(base_settings(tmp_path / "nowhere")))])
    assert not (tmp_path / "runs").exists()


def test_two_sweeps_do_not_share_a_folder(write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path) -> None:
    stand_in()
    path = write_sweep()
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    with (folder / "sweep.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 7 on node1")
        other.flush()
        with pytest.raises(BadInputError, match="process 7 on node1 works on this sweep"):
            main([str(path)])
    assert main([str(path)]) == 0


def test_a_cell_that_outlived_its_sweep_is_waited_for(
    write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in()
    cell = tmp_path / "runs" / "small" / "d16-s0"
    cell.mkdir(parents=True)
    held = (cell / LOCK).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)

    def release() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and "d24-s0" not in starts_of(tmp_path):
            time.sleep(0.01)
        assert "d16-s0" not in starts_of(tmp_path)
        held.close()

    thread = threading.Thread(target=release)
    thread.start()
    assert main([str(write_sweep())]) == 0
    thread.join()
    assert capsys.readouterr().out.count("d16-s0: a process of an earlier start still trains it") == 1
    assert len(rows_of(tmp_path)) == 2


def test_a_resumed_cell_keeps_its_wandb_run(write_sweep: WriteSweep, tmp_path: Path) -> None:
    path = write_sweep(flops=[4e9], warmup_fraction=0.1)
    plans = [json.loads(load_sweep(path)[1][0].prepare().read_text()) for _ in range(2)]
    other = json.loads(load_sweep(path)[1][1].prepare().read_text())["logging"]
    logging = plans[0]["logging"]
    assert plans[0] == plans[1]
    assert logging["wandb_id"] != other["wandb_id"]
    assert logging["wandb_group"] == other["wandb_group"] == "small"
    assert logging["annotations"]["flops_level"] == 4e9
    assert logging["annotations"]["training_flops"] == pytest.approx(4e9, rel=0.02)


def test_a_dry_run_writes_nothing(
    write_sweep: WriteSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main([str(write_sweep()), "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    output = capsys.readouterr().out
    assert "d24-s0" in output
    assert "2 waiting; 0% of" in output


def test_a_cell_of_an_array_is_prepared_unless_it_is_finished(
    write_sweep: WriteSweep, stand_in: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep()
    assert main([str(path), "--cell", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "runs/small/d24-s0" / PLAN)
    with pytest.raises(BadInputError, match="has cells 0 to 1"):
        main([str(path), "--cell", "2"])
    stand_in()
    assert main([str(path)]) == 0
    capsys.readouterr()
    assert main([str(path), "--cell", "1"]) == 0
    assert capsys.readouterr().out == ""


def test_each_cell_has_gpus_of_its_own(
    write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = """
import json, os, pathlib, sys
plan = json.loads(pathlib.Path(sys.argv[-1]).read_text())["run"]
pathlib.Path(plan["dir"], plan["name"], "gpus").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
sys.exit(78)
"""
    commands = []

    def command(plan: Path, ranks: int, on_gpus: bool) -> list[str]:
        commands.append(training_command(plan, ranks, on_gpus))
        return [sys.executable, "-c", seen, str(plan)]

    monkeypatch.setattr(local, "training_command", command)
    monkeypatch.setattr(local, "_devices", lambda: ["0", "1", "4", "5", "6"])
    path = write_sweep(parallel=2, ranks=2, seeds=[0])
    assert main([str(path)]) == 78
    gpus = {file.parent.name: file.read_text() for file in tmp_path.glob("runs/small/*/gpus")}
    assert sorted(gpus.values()) == ["0,1", "4,5"]
    # The launcher starts a rank for each of them, and would ignore them were it told a number.
    assert all("--num_gpus" not in words and "--master_port" in words for words in commands)
    assert "--num_gpus" in training_command(path, 2, on_gpus=False)
    assert training_command(path, 1, on_gpus=False)[-2:] == ["--config", str(path)]
    monkeypatch.setattr(local, "_devices", lambda: ["0"])
    with pytest.raises(BadInputError, match="ranks = 2: cells here can have 1 GPUs at most"):
        main([str(path)])


def test_finished_cells_are_evaluated_by_depth_once_and_the_rows_say_what_came_of_it(
    write_sweep: WriteSweep,
    stand_in: StandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[str, list[int]]] = []

    def evaluate_run(run: Path, depths: list[int]) -> SimpleNamespace:
        """A stand-in that loses 1 / depth, and writes what the real one writes."""
        if run.name == "d24-s1":
            raise BadInputError(f"{run}: no weights")
        calls.append((run.name, depths))
        by_loops = {depth: {"nats_per_token": 4 + 1 / depth, "bits_per_byte": 2 + 1 / depth} for depth in depths}
        (run / "evaluation.json").write_text(json.dumps({"checkpoint": "step_00000020", "by_loops": by_loops}))
        return SimpleNamespace(by_loops={depth: SimpleNamespace(**losses) for depth, losses in by_loops.items()})

    monkeypatch.setattr(evaluate, "evaluate_run", evaluate_run)
    stand_in(d24_s0=["refuse"])
    path = write_sweep(seeds=[0, 1])
    assert main([str(path)]) == 78
    assert [row["by_loops"] for row in rows_of(tmp_path)] == [None] * 3
    assert main([str(path), "--evaluate", "4,1"]) == 78, "a cell without weights was passed over in silence"
    assert "d24-s1: refused: " in capsys.readouterr().out
    rows = {row["cell"]: row for row in rows_of(tmp_path)}
    assert rows["d16-s0"]["by_loops"] == {
        "1": {"validation_loss": 5.0, "bits_per_byte": 3.0},
        "4": {"validation_loss": 4.25, "bits_per_byte": 2.25},
    }
    assert rows["d24-s1"]["by_loops"] is None
    assert calls == [("d16-s0", [1, 4]), ("d16-s1", [1, 4])]
    main([str(path), "--evaluate", "1,4"])
    assert len(calls) == 2, "known depths were computed again"
    main([str(path), "--evaluate", "2"])
    assert calls[2:] == [("d16-s0", [1, 2, 4]), ("d16-s1", [1, 2, 4])], "known depths were lost"
    # What was evaluated is no longer what the cell holds: its row must not say so.
    (tmp_path / "runs/small/d16-s0/evaluation.json").write_text(
        json.dumps({"checkpoint": "step_00000015", "by_loops": {"1": {"nats_per_token": 9, "bits_per_byte": 9}}})
    )
    assert main([str(path), "--collect"]) == 0
    assert {row["cell"]: row["by_loops"] for row in rows_of(tmp_path)}["d16-s0"] is None
