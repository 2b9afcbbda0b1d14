"""What a fault does to a run on several ranks: numbers that are not finite, spikes, lost and hanging ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from rank_pool import RankPool
from scenarios import settings
from training_runs import SAME, committed, evaluation_lines, make_dataset, training_lines, write_config

from pretrain.checkpoint import find_damage

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(500)]

FAULTS = {1: "loss", 2: "infinite_loss", 4: "gradients", 5: "expert"}
BATCHES = 7


@pytest.mark.parametrize(
    ("zero_stage", "dtype", "expert_parallel_size"),
    [(0, "fp32", 2), (0, "bf16", 2), (1, "fp32", 2), (2, "bf16", 1), (3, "fp32", 1), (3, "fp32", 2), (3, "bf16", 2)],
)
def test_steps_with_numbers_that_are_not_finite_on_one_rank_never_were(
    two_ranks: RankPool, zero_stage: int, dtype: str, expert_parallel_size: int
) -> None:
    values = settings(
        optim={"lr": 0.01, "grad_clip": 0.1, "eps": 1e-4},
        precision={"dtype": dtype},
        parallel={"zero_stage": zero_stage, "expert_parallel_size": expert_parallel_size, "micro_batch_size": 2},
    )
    numbers = list(range(BATCHES))
    got = two_ranks.run(rank_jobs.train_with_faults, values=values, numbers=numbers, faults=FAULTS)[0]
    assert got.skipped == list(FAULTS)
    healthy = [number for number in numbers if number not in FAULTS]
    expected = two_ranks.run(rank_jobs.train_with_faults, values=values, numbers=healthy, faults={})[0]
    assert expected.skipped == []
    assert got.losses == expected.losses
    assert got.norms == expected.norms
    for name, weight in expected.weights.items():
        assert torch.equal(got.weights[name], weight), name


STEPS, BATCH = 20, 16
SPIKE = (13 * BATCH, 17 * BATCH)  # the samples of steps 14 to 17


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("faults"), seed=1)


def run_values(folder: Path, data: Path, name: str, **stability: Any) -> dict[str, Any]:
    """A run of 20 steps that saves every 5 and evaluates every 10; no watchdog, since crashes are only simulated."""
    values: dict[str, Any] = json.loads(write_config(folder, data, name).read_text())
    values["schedule"]["steps"] = STEPS
    # Nothing that costs time and shows nothing here: of the ideas, the sampled depth stays.
    values["model"].update(aec=False, slu=False, msrd_scales=[1], lora_rank=0)
    values["loop"] = {"distribution": "poisson", "mean_loops": 2, "max_loops": 3}
    values["parallel"]["micro_batch_size"] = 8
    values["watchdog"] = {"enabled": False}
    values["stability"] = {"spike_window": 8, "spike_steps": 4, "rollback_margin_steps": 1, **stability}
    return values


def assert_same_steps(got: Path, expected: Path) -> None:
    lines, wanted = training_lines(got), training_lines(expected)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, wanted, strict=True):
        assert {key: line.get(key) for key in SAME} == {key: other.get(key) for key in SAME}
    assert evaluation_lines(got) == evaluation_lines(expected)
    last = f"checkpoints/step_{STEPS:08d}"
    for name in ("biases.safetensors", "weights/model-00000.safetensors"):
        assert (got / last / name).read_bytes() == (expected / last / name).read_bytes(), name


def test_a_spike_rolls_back_and_leaves_its_samples_out_however_often_the_run_is_killed(
    two_ranks: RankPool, data: Path, tmp_path: Path
) -> None:
    def train(name: str, stability: dict[str, Any], **arguments: Any) -> tuple[Path, list[int | str]]:
        values = run_values(tmp_path, data, name, **stability)
        statuses = two_ranks.run(rank_jobs.run_training, timeout_seconds=400, values=values, **arguments)
        assert statuses[0] == statuses[1]
        return tmp_path / "runs" / name, statuses[0]

    # Steps 14 to 17 are high, and 13 is the margin. The checkpoint of step 15 is from within the spike: back to 10.
    spiked, statuses = train("spiked", {}, spike=SPIKE)
    assert statuses == [0]
    faults = [json.loads(line) for line in (spiked / "faults.jsonl").read_text().splitlines()]
    assert [(fault["kind"], fault["step"], fault["to_step"]) for fault in faults] == [("roll_back", 17, 10)]
    assert faults[0]["skipped_samples"] == [12 * BATCH, 17 * BATCH]
    assert [line["rollbacks"] for line in training_lines(spiked)] == [0] * 10 + [1] * 10
    assert training_lines(spiked)[-1]["next_sample"] == (STEPS + 5) * BATCH

    by_hand, statuses = train("by_hand", {"skip_samples": [[12 * BATCH, 17 * BATCH]]})
    assert statuses == [0]
    assert_same_steps(by_hand, spiked)

    # Killed in the spike, after the save within it; then after the roll-back, with nothing saved since; and asked to
    # stop after the last step, before its evaluation.
    killed, statuses = train("killed", {}, spike=SPIKE, crash_after=[16, 12], stop_after=[20])
    assert statuses == ["crash", "crash", 75, 0]
    assert_same_steps(killed, spiked)
    assert [line["rollbacks"] for line in training_lines(killed)] == [0] * 10 + [1] * 10
    assert (killed / "faults.jsonl").read_text().count("roll_back") == 2

    # What does not end is given up.
    hopeless, statuses = train("hopeless", {"max_rollbacks": 1}, spike=(SPIKE[0], 10**9))
    assert statuses == [1]
    assert training_lines(hopeless)[-1]["rollbacks"] == 1


def test_the_preflight_names_the_host_that_is_slow_with_both_neighbours(
    pool_of: Callable[[int], RankPool], data: Path, tmp_path: Path
) -> None:
    values = run_values(tmp_path, data, "preflight")
    for findings in pool_of(4).run(rank_jobs.preflight_with_a_slow_host, values=values, slow_rank=2):
        by_check = {finding.check: finding for finding in findings}
        assert list(by_check) == ["disk space", "data", "memory", "versions", "clocks", "links"]
        assert by_check["links"].hosts == ("node2",)
        assert [finding.check for finding in findings if finding.wrong] == ["links"]


class Ranks:
    """Both ranks of the training command, started as a cluster's scheduler does, each with a status of its own."""

    def __init__(self, root: Path, config: Path, *arguments: str) -> None:
        port = random.SystemRandom().randrange(20000, 30000)
        self.logs = [config.with_suffix(f".{time.monotonic_ns()}.{rank}.log") for rank in range(2)]
        self.processes = []
        for rank in range(2):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_SIZE": 2, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "pretrain/main.py", "--config", str(config), *arguments]
            with self.logs[rank].open("wb") as log:
                ours = {**os.environ, **environment}
                self.processes.append(subprocess.Popen(command, cwd=root, env=ours, stdout=log, stderr=log))

    def wait_for_step(self, run: Path, step: int) -> None:
        deadline = time.monotonic() + 300
        while not any(line["step"] >= step for line in training_lines(run)):
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                pytest.fail(f"step {step} was not reached:\n{self.output()}")
            time.sleep(0.01)

    def end(self) -> list[int]:
        """The statuses, by rank."""
        try:
            return [process.wait(300) for process in self.processes]
        except subprocess.TimeoutExpired:
            pytest.fail(self.output())
        finally:
            for process in self.processes:
                process.kill()

    def output(self) -> str:
        return "".join(log.read_text()[-6000:] for log in self.logs)


def test_a_run_that_loses_its_first_rank_ends_resumably_and_goes_on_to_the_bit(
    two_ranks: RankPool, data: Path, tmp_path: Path, repository_root: Path
) -> None:
    values = run_values(tmp_path, data, "lost")
    values["watchdog"] = {"silence_seconds": 8, "floor_seconds": 100}
    config, run = tmp_path / "lost.json", tmp_path / "runs" / "lost"
    config.write_text(json.dumps(values))
    ranks = Ranks(repository_root, config)
    ranks.wait_for_step(run, 6)
    ranks.processes[0].kill()
    assert ranks.end() == [-signal.SIGKILL, 75], ranks.output()
    (entry,) = [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]
    assert (entry["kind"], entry["of_rank"], entry["rank"]) == ("silent_rank", 0, 1)
    (stacks,) = run.glob("stacks/*/rank_00001.txt")
    assert "trainer.py" in stacks.read_text()

    ranks = Ranks(repository_root, config)
    assert ranks.end() == [0, 0], ranks.output()
    values["run"]["name"] = "undisturbed"
    assert two_ranks.run(rank_jobs.run_training, timeout_seconds=400, values=values) == [[0], [0]]
    assert_same_steps(run, tmp_path / "runs" / "undisturbed")


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("full_disk", 1, "[Errno 28] No space left on device: 'metrics.jsonl'; the same command goes on from the last"),
        ("slow_read", 1, "samples 48 to 63 were not read in 4 s (data.read_timeout_seconds)"),
        ("stopped_in_slow_read", "ended with 75", ""),
    ],
)
def test_storage_that_fails_is_named_in_one_line_and_hurts_no_checkpoint(
    pool_of: Callable[[int], RankPool], data: Path, tmp_path: Path, fault: str, status: int | str, said: str
) -> None:
    values = run_values(tmp_path, data, fault)
    values["parallel"]["expert_parallel_size"] = 1
    values["data"]["read_timeout_seconds"] = 600 if fault == "stopped_in_slow_read" else 4
    values["checkpoint"]["every"] = 2
    ((got, output),) = pool_of(1).run(rank_jobs.run_with_storage_fault, values=values, fault=fault)
    assert got == status
    if said:
        (line,) = [line for line in output.splitlines() if line.startswith("error:")]
        assert line.startswith(f"error: rank 0 on {socket.gethostname()}: ")
        assert said in line
    # A stopped run saves the step that it has; the others leave what was saved before.
    last = 3 if fault == "stopped_in_slow_read" else 2
    run = tmp_path / "runs" / fault
    assert committed(run)[-1] == last
    assert find_damage(run / "checkpoints" / f"step_{last:08d}") is None
