"""Whole runs through the real command line: ``deepspeed --num_gpus 2 pretrain/main.py``, killed, resumed, damaged.

One run goes to the end undisturbed. A second one, of the same configuration, is asked to stop, resumed, killed without
warning, and resumed again; it must end with the same numbers, to the bit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from rank_pool import RankPool
from training_runs import (
    EVERY,
    STEPS,
    Launch,
    assert_same_run,
    committed,
    evaluation_lines,
    make_dataset,
    training_lines,
    write_config,
)

from data_pipeline.dataset.reader import open_dataset
from pretrain.data import TokenSequences

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(500)]


def read_history(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, values) of every row in an offline run's file, which is a log in LevelDB's format of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:  # a record's header does not cross blocks
            position += room
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):
            return  # cut short by a kill
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                row = {
                    ".".join(each.nested_key) or each.key: json.loads(each.value_json) for each in record.history.item
                }
                yield record.history.step.num, row


def samples_an_epoch(run: Path) -> int:
    """Rows in the training split of a run's data set."""
    config = json.loads((run / "config.json").read_text())
    length, seed = config["data"]["sequence_length"], config["run"]["seed"]
    return TokenSequences(open_dataset(Path(config["data"]["path"])), "train", length, seed).n_blocks


def assert_history_without_gaps(run: Path) -> None:
    """What W&B was told over all starts: every step, in order within a start, and the same when it was told again."""
    losses = {line["step"]: line["loss"] for line in training_lines(run)}
    told: dict[int, float] = {}
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 4
    for file in files:
        rows = dict(read_history(file))  # of a start that was killed, perhaps none
        assert list(rows) == list(range(min(rows, default=0), max(rows, default=-1) + 1)), file.name
        assert all(row["loss"] == losses[step] for step, row in rows.items())
        assert all("validation_bits_per_byte" in rows[step] for step in (10, 20) if step in rows)
        told.update({step: row["loss"] for step, row in rows.items()})
    assert told == losses


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with ``data`` and ``other/data``, and the processes of failed tests ended at last."""
    folder = tmp_path_factory.mktemp("training")
    make_dataset(folder, seed=1)
    make_dataset(folder / "other", seed=2)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(place: Path, repository_root: Path) -> Path:
    """The run directory of 20 steps in one go."""
    status, output = Launch(repository_root, write_config(place, place / "data", "undisturbed")).end()
    assert status == 0, output
    return place / "runs" / "undisturbed"


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    lines = training_lines(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["next_sample"] for line in lines] == [16 * step for step in range(1, STEPS + 1)]
    assert len({line["loops"] for line in lines}) > 2
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert {"loss", "lr", "grad_norm", "loops", "tokens", "tokens_per_second", "step_seconds"} <= lines[0].keys()
    assert [line["step"] for line in evaluation_lines(undisturbed)] == [10, 20]
    assert committed(undisturbed) == [15, 20]
    assert (undisturbed / "checkpoints" / "latest").read_text() == "step_00000020\n"
    assert json.loads((undisturbed / "config.json").read_text())["run"]["name"] == "undisturbed"


def test_a_run_stopped_and_killed_and_resumed_is_the_undisturbed_run_to_the_bit(
    place: Path, undisturbed: Path, repository_root: Path
) -> None:
    config = write_config(place, place / "data", "disturbed", wandb="offline")
    run = place / "runs" / "disturbed"

    # A scheduler's signal reaches one rank only; both save the same step and leave.
    launch = Launch(repository_root, config)
    launch.wait_for_step(run, 6)
    launch.ranks()[1].send_signal(signal.SIGTERM)
    status, output = launch.end()
    assert status == 75, output
    assert "the same command continues from there" in output
    stopped_at = committed(run)[-1]
    assert 6 <= stopped_at < 10, "the machine was slow to deliver a signal"

    # Killed while step 10 is written: it was committed or not.
    launch = Launch(repository_root, config)
    launch.wait_for_file(run / "checkpoints", "partial_step_00000010_*/content/engine/*")
    launch.kill()
    assert f"resuming after step {stopped_at}" in launch.log.read_text()
    assert 10 <= training_lines(run)[-1]["step"] < 15, "killed too late to show anything"
    survived = committed(run)[-1]
    assert survived in (stopped_at, 10)

    # Killed between two saves, in the second epoch of the data.
    launch = Launch(repository_root, config)
    launch.wait_for_step(run, 12)
    time.sleep(random.SystemRandom().uniform(0, 0.5))
    launch.kill()
    assert f"resuming after step {survived}" in launch.log.read_text()
    assert 12 <= training_lines(run)[-1]["step"] < STEPS, "killed too late to show anything"
    survived = committed(run)[-1]

    status, output = Launch(repository_root, config).end()
    assert status == 0, output
    assert f"resuming after step {survived}" in output
    assert stopped_at * 16 < samples_an_epoch(run) < 12 * 16, "the epoch must end between the starts"
    assert_same_run(run, undisturbed)
    assert not [path.name for path in (run / "checkpoints").iterdir() if "partial" in path.name], "remains of a kill"
    assert json.loads((run / "generation.json").read_text())["generation"] == 4
    ids = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("offline-run-*")}
    state = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    assert ids == {state["wandb_id"]}
    assert_history_without_gaps(run)


@pytest.mark.skipif(
    not shutil.which("mpirun") or not importlib.util.find_spec("mpi4py"),
    reason="mpirun or mpi4py is missing: apt-get install openmpi-bin; pip install -c constraints.txt mpi4py",
)
def test_mpirun_trains_as_the_launcher_does(place: Path, undisturbed: Path, repository_root: Path) -> None:
    config = write_config(place, place / "data", "mpi")
    options = ["-n", "2", "--oversubscribe", "--bind-to", "none"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = subprocess.run(
        ["mpirun", *options, sys.executable, "pretrain/main.py", "--config", str(config)],
        cwd=repository_root,
        env={**os.environ, **root, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert_same_run(place / "runs" / "mpi", undisturbed)


def test_a_flipped_byte_is_found_and_the_checkpoint_before_it_is_used(
    place: Path, undisturbed: Path, repository_root: Path
) -> None:
    run = place / "runs" / "flipped"
    shutil.copytree(undisturbed, run)
    damaged = sorted((run / "checkpoints" / "step_00000020" / "engine").rglob("*optim_states.pt"))[-1]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    status, output = Launch(repository_root, write_config(place, place / "data", "flipped")).end()
    assert status == 0, output
    assert "step_00000020 is damaged" in output
    assert damaged.name in output
    assert "another sha256" in output
    assert "resuming after step 15" in output
    assert_same_run(run, undisturbed)


def test_a_changed_model_ends_with_one_line_and_status_78(
    place: Path, undisturbed: Path, repository_root: Path
) -> None:
    config = write_config(place, place / "data", "undisturbed")
    before = (undisturbed / "metrics.jsonl").read_bytes()
    status, output = Launch(repository_root, config, "--set", "model.n_experts_per_tok=4").end()
    assert status == 78, output
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, output
    assert "model.n_experts_per_tok was 2, is 4" in errors[0]
    assert "Traceback" not in output
    assert (undisturbed / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data": {"path": "other/data"}}, "data.fingerprint was"),
        ({"run": {"seed": 12}}, "data.seed was 11, is 12"),
        ({"data": {"global_batch_size": 32}}, "data.global_batch_size was 16, is 32"),
        ({"parallel": {"zero_stage": 2}}, "topology.zero_stage was 3, is 2"),
    ],
)
def test_other_data_or_another_topology_is_refused_by_name(
    two_ranks: RankPool, place: Path, undisturbed: Path, changes: dict[str, dict[str, Any]], expected: str
) -> None:
    values = json.loads(write_config(place, place / "data", "undisturbed").read_text())
    for section, keys in changes.items():
        values[section].update(keys)
    if "path" in changes.get("data", {}):
        values["data"]["path"] = str(place / changes["data"]["path"])
    for answer in two_ranks.run(rank_jobs.refusal_of_training, values=values):
        assert answer.startswith("BadInputError"), answer
        assert expected in answer


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_run_goes_on_with_other_ranks_as_if_nothing_had_changed(
    place: Path, undisturbed: Path, repository_root: Path, ranks: int
) -> None:
    name = f"elastic_{ranks}"
    run = place / "runs" / name
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    config = write_config(place, place / "data", name)
    saved = f"step_{STEPS - EVERY:08d}"
    if ranks == 1:  # made ahead by the command, and by the run itself
        subprocess.run(
            [sys.executable, "launch/reshape.py", "--run", str(run)], cwd=repository_root, check=True, timeout=300
        )
    arguments = ("--set", f"parallel.expert_parallel_size={ranks}")
    status, output = Launch(repository_root, config, *arguments, ranks=ranks).end(timeout_seconds=400)
    assert status == 0, output
    how = "loaded from" if ranks == 1 else "converted in"
    assert f"checkpoint {saved}: ranks 2 to {ranks}, expert_parallel_size 2 to {ranks}; {how}" in output
    assert (run / "checkpoints" / f"universal_{saved}" / "manifest.json").exists()
    lines, expected = training_lines(run), training_lines(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        for key in ("lr", "loops", "tokens", "next_sample"):
            assert line[key] == other[key], key
        for key in ("loss", "shallow_loss", "depth_contrast"):
            assert line[key] == pytest.approx(other[key], rel=1e-5), f"{key} of step {line['step']}"
    assert evaluation_lines(run)[-1]["validation_bits_per_byte"] == pytest.approx(
        evaluation_lines(undisturbed)[-1]["validation_bits_per_byte"], rel=1e-5
    )


def test_a_plan_through_the_launcher_starts_no_run(place: Path, repository_root: Path) -> None:
    status, output = Launch(repository_root, write_config(place, place / "data", "planned"), "--dry-run").end(
        timeout_seconds=60
    )
    assert status == 0, output
    assert output.count("planned.json: valid") == 1, output
    assert not (place / "runs" / "planned").exists()
