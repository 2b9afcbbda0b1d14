"""``sbatch slurm/ice_1b.sh`` on a real Slurm: two nodes, every fault that a cluster has, and losses as if nothing was.

The script is the shipped one, unmodified. Arguments after it name another configuration (a tiny model on two CPU
ranks, EP = 2, one rank a node), and sbatch's own arguments another number of tasks. What a fault needs in time is
Slurm's: 20 to 30 s until a dead node is DOWN and its job runs elsewhere. Where a test looks at a run, it holds the
ranks (SIGSTOP) rather than count on their speed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from slurm_jobs import ENDED, SlurmJob, held, local_slurm, submit, wait_for

sys.path.insert(0, str(Path(__file__).parents[1] / "multirank"))

from training_runs import VOCABULARY, committed, make_dataset, training_lines

from pretrain.config import TrainingConfig

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

STEPS, EVERY = 60, 5
SAME = ("step", "loss", "lr", "grad_norm", "loops", "tokens", "next_sample", "expert_load_worst_loop")
TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
START_SECONDS = 240  # imports, on a machine that does other things too


def write_config(folder: Path, name: str) -> Path:
    """A run of seconds in ``folder/runs/NAME``; expert parallel, at sampled depths."""
    values: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / "runs"), "seed": 5},
        "model": {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "max_seq_len": 32,
            "max_output_tokens": 32,
            "prelude_layers": 1,
            "recurrent_layers": 1,
            "coda_layers": 1,
            "max_loop_iters": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "ffn_dim": 32,
            "n_experts": 4,
            "n_experts_per_tok": 2,
            "expert_dim": 8,
            "initial_state": "random",
        },
        "data": {"path": str(folder / "data"), "sequence_length": 32, "global_batch_size": 4},
        "optim": {"lr": 0.01},
        "schedule": {"steps": STEPS, "warmup_steps": 3},
        "loop": {"distribution": "poisson", "mean_loops": 2, "remat": "none"},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 3, "expert_parallel_size": 2, "micro_batch_size": 2},
        "checkpoint": {"every": EVERY, "keep_last": 3, "plain_weights": False},
        "eval": {"every": STEPS, "sequences": 4},
        "logging": {"wandb": "disabled", "tensorboard": False, "plot": False, "console_every": 1},
    }
    if "watchdog" in TrainingConfig.model_fields:  # held ranks are silent, and must not be taken for lost ones
        values["watchdog"] = {"silence_seconds": 3000, "floor_seconds": 3600, "ceiling_seconds": 3600}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data``, seen by all nodes."""
    folder = tmp_path_factory.mktemp("jobs")
    make_dataset(folder, seed=3)
    return folder


class Jobs:
    """Submits training jobs, and ends all of them at last."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root, self.place = root, place
        self.submitted: list[SlurmJob] = []

    def train(self, name: str, *sbatch_arguments: str, settings: tuple[str, ...] = (), **environment: str) -> SlurmJob:
        config = write_config(self.place, name)
        overrides = [part for setting in settings for part in ("--set", setting)]
        environment = {"ICE_PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "ICE_POLL_SECONDS": "1", **environment}
        job = submit(
            self.root,
            self.place / f"{name}.log",
            *("--open-mode=append", *TWO_RANKS, *sbatch_arguments, "slurm/ice_1b.sh", "--config", str(config)),
            *overrides,
            **environment,
        )
        self.submitted.append(job)
        return job


@pytest.fixture
def jobs(cluster: None, place: Path, repository_root: Path) -> Iterator[Jobs]:
    made = Jobs(repository_root, place)
    yield made
    for job in made.submitted:
        job.cancel()


def last_step(run: Path) -> int:
    return max((line["step"] for line in training_lines(run)), default=0)


def last_saved(run: Path) -> int:
    return max(committed(run), default=0)


def wait_for_step(job: SlurmJob, run: Path, step: int) -> None:
    """Until the run has logged ``step``, and saved what it had to save before."""

    def reached() -> bool:
        return last_step(run) >= step and last_saved(run) >= step // EVERY * EVERY

    wait_for(lambda: reached() or job.state in ENDED, START_SECONDS, job.text)
    assert reached(), job.text()


def identity_of(path: Path) -> tuple[int, int] | None:
    """Changes when the file is written anew, also with the same bytes; None when it is gone."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def test_a_run_survives_every_fault_and_is_the_unbroken_run_to_the_bit(jobs: Jobs, place: Path) -> None:
    unbroken = jobs.train("unbroken")  # beside the other, on nodes of its own
    run = place / "runs" / "chain"
    scancel_saves_and_does_not_requeue(jobs, run)
    job = jobs.train("chain")
    wait_for_step(job, run, last_step(run) + EVERY + 1)
    the_time_limit_saves_and_requeues(job, run)
    wait_for_step(job, run, last_step(run) + EVERY + 1)
    a_killed_rank_is_retried(job)
    wait_for_step(job, run, last_step(run) + EVERY + 1)
    a_node_that_loses_power_is_replaced(job)
    wait_for_step(job, run, last_step(run) + EVERY + 1)
    a_stale_start_commits_nothing(job, run)
    wait_for_step(job, run, last_step(run) + EVERY + 1)
    a_hung_node_is_replaced(job)
    assert job.wait_for_end() == "COMPLETED", job.text()
    assert job.restarts >= 5
    assert job.text().count("job " + job.number + ": finished") == 1

    assert unbroken.wait_for_end() == "COMPLETED", unbroken.text()
    assert unbroken.restarts == 0
    assert "2 ranks, ZeRO-3, EP=2" in unbroken.text()
    assert "\x1b" not in unbroken.text(), "a progress bar in a log"
    got, wanted = training_lines(run), training_lines(place / "runs" / "unbroken")
    assert [line["step"] for line in got] == [line["step"] for line in wanted] == list(range(1, STEPS + 1))
    for line, other in zip(got, wanted, strict=True):
        assert {key: line[key] for key in SAME} == {key: other[key] for key in SAME}
    biases = f"checkpoints/step_{STEPS:08d}/biases.safetensors"
    assert (run / biases).read_bytes() == (place / "runs" / "unbroken" / biases).read_bytes()


def scancel_saves_and_does_not_requeue(jobs: Jobs, run: Path) -> None:
    job = jobs.train("chain")
    wait_for_step(job, run, 2)
    job.cancel()
    assert job.wait_for_end() == "CANCELLED"
    wait_for(lambda: last_saved(run) == last_step(run), 30, job.text)
    job.wait_for_text("asked to stop: saved step", 30)
    assert job.restarts == 0


def the_time_limit_saves_and_requeues(job: SlurmJob, run: Path) -> None:
    """The script asks for USR1 300 s before the end; an end that is suddenly that near brings it within 30 s."""
    with held(job.ranks()):
        minutes, seconds = job.field("RunTime").rsplit(":", 2)[-2:]
        job.update(TimeLimit=str(math.ceil(int(minutes) + int(seconds) / 60) + 3))
        job.wait_for_text("received USR1", 90)
    wait_for(lambda: job.restarts == 1, 120, job.text)
    job.update(TimeLimit="1-0")
    assert last_saved(run) == last_step(run)
    job.wait_for_restart(1)
    assert "training ended with status 75" in job.text()
    assert "back in the queue" in job.text()


def a_killed_rank_is_retried(job: SlurmJob) -> None:
    job.ranks()[1].kill()
    job.wait_for_restart(2)
    assert job.text().count("back in the queue") == 2


def a_node_that_loses_power_is_replaced(job: SlurmJob) -> None:
    lost = job.nodes[1]
    local_slurm("kill-node", lost)
    job.wait_for_restart(3)
    # By Slurm: had the shell put it back before, the job would have lost its GPUs.
    assert job.text().count("back in the queue") == 2
    assert job.text().count("Unable to create step") == 0
    assert lost not in job.nodes
    local_slurm("start-node", lost)


def a_stale_start_commits_nothing(job: SlurmJob, run: Path) -> None:
    """Both nodes' daemons die, the ranks live on while the job runs again elsewhere: a split brain."""
    stale, nodes = job.ranks(), job.nodes
    assert len(stale) == 2
    with held(stale):
        before = last_step(run)
        for node in nodes:
            local_slurm("kill-slurmd", node)
        # Slurm 22.05 may start a job that lost both nodes without GPUs; that start fails, and is retried.
        job.wait_for_restart(4)
        # Past the step that the stale ranks would save next.
        wait_for_step(job, run, before // EVERY * EVERY + EVERY)
        assert not set(nodes) & set(job.nodes)
        current = job.ranks()
    assert len(current) == 2
    with held(current):
        checkpoints = run / "checkpoints"
        files = [*checkpoints.glob("step_*/*"), checkpoints / "latest", run / "metrics.jsonl"]
        seen = {path: identity_of(path) for path in files if path.is_file()}
        _, alive = psutil.wait_procs(stale, timeout=120)
        assert not alive, "the stale ranks go on"
        assert {path: identity_of(path) for path in seen} == seen
        assert set(checkpoints.glob("step_*/manifest.json")) <= set(seen)
        job.wait_for_text("Slurm has given up on this start; left alone", 60)
    for node in nodes:
        local_slurm("start-node", node)


def a_hung_node_is_replaced(job: SlurmJob) -> None:
    """The batch shell's own node falls silent."""
    lost, before = job.nodes[0], job.restarts
    local_slurm("hang-node", lost)
    job.wait_for_restart(before + 1)
    assert lost not in job.nodes
    local_slurm("start-node", lost)


# Stands for training in what is decided without it: reports a bad host the first time, and crashes.
CRASHES = """#!/bin/bash
[[ $2 == pretrain/main.py ]] || exec {python} "$@"
echo "rank $RANK on $(hostname) crashes"
[[ $RANK == 1 && ! -e {run}/preflight.json ]] && echo "{{\\"bad_hosts\\": [\\"$(hostname)\\"]}}" >{run}/preflight.json
exit 3
"""


def test_a_job_that_never_gets_on_is_given_up_and_leaves_out_bad_nodes(jobs: Jobs, place: Path) -> None:
    stand_in = place / "python"
    stand_in.write_text(CRASHES.format(python=sys.executable, run=place / "runs" / "crashing"))
    stand_in.chmod(0o755)
    job = jobs.train("crashing", ICE_PYTHON=str(stand_in), ICE_RETRIES="1")
    wait_for(lambda: job.state in (*ENDED, "PENDING") and "back in the queue" in job.text(), START_SECONDS, job.text)
    bad = job.field("ExcNodeList")
    assert job.wait_for_end() == "FAILED", job.text()
    assert job.field("ExitCode") == "3:0"
    assert job.restarts == 1
    assert f"rank 1 on {bad} crashes" in job.text()
    assert job.text().count(f"on {bad} crashes") == 1, "the node that failed preflight was used again"
    assert "error: 2 starts in a row ended without a checkpoint" in job.text()


def test_a_wrong_configuration_fails_once_and_is_not_requeued(jobs: Jobs, place: Path) -> None:
    early = jobs.train("wrong", settings=("parallel.expert_parallel_size=3",))
    late = jobs.train("late", settings=(f"data.path={place / 'nowhere'}",))  # what only the ranks find
    for job in (early, late):
        assert job.wait_for_end() == "FAILED", job.text()
        assert job.field("ExitCode") == "78:0"
        assert job.restarts == 0
        errors = [line for line in job.text().splitlines() if line.startswith("error:")]
        assert len(errors) == 1, job.text()
        assert "Traceback" not in job.text()
    assert "parallel.expert_parallel_size = 3" in early.text()
    assert "nowhere" in late.text()
    assert not list(place.glob("runs/wrong/slurm/start-*")), "ranks were started for it"
