"""slurm/common.sh against stand-ins for Slurm's commands: what a real cluster cannot be made to show in a test's time.

Every way that ranks can end, a controller that does not answer, an srun that never returns. The real Slurm is in
test_training_job.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

# Two ranks; returns the higher status and signals all processes of the step, as srun does. HANG_SRUN: never returns.
FAKE_SRUN = """#!/bin/bash
set -m
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 -$first -$second; again=yes' USR1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
highest=0
for rank in $first $second; do
    while again=no; wait $rank; status=$?; [[ $again == yes ]]; do :; done
    if ((status > highest)); then highest=$status; fi
done
if [[ -n $SRUN_STATUS ]]; then exit "$SRUN_STATUS"; fi
if [[ -n $HANG_SRUN ]]; then trap 'echo "srun got TERM"; exit 143' TERM; while :; do sleep 0.1; done; fi
exit "$highest"
"""
FAKE_SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
if [[ $2 == hostnames ]]; then printf 'node7\\nnode8\\n'; fi
if [[ $2 == job ]]; then
    if [[ -e $SILENT ]]; then rm "$SILENT"; echo "slurm_load_jobs error: Unable to contact controller" >&2; exit 1; fi
    echo "JobId=54321 JobName=x JobState=$JOB_STATE Restarts=0 ExcNodeList=$EXCLUDED"
fi
"""
FAKE_SINFO = """#!/bin/bash
printf 'node7 allocated\\nnode8 %s\\n' "$(cat "$NODE_STATE")"
"""
# A rank: ends with its word of FAKE_STATUSES, at once or after FAKE_TENTHS. retry_budget.py is the real one, but for
# the check of the configuration, which would import torch.
FAKE_PYTHON = """#!/bin/bash
shift
if [[ $1 == launch/retry_budget.py && $2 == begin ]]; then
    [[ -z $BEGIN_STATUS ]] || exit "$BEGIN_STATUS"
    echo "begin $*" >> "$CALLS"; echo "$RUN"; exit
fi
if [[ $1 == launch/sweep.py ]]; then
    echo "sweep $2 $3 $4" >> "$CALLS"
    if [[ $3 == --cell ]]; then echo "$PLAN"; exit "${SWEEP_STATUS:-0}"; fi
    exit
fi
if [[ $1 == launch/retry_budget.py ]]; then exec "$REAL_PYTHON" "$@"; fi
trap 'echo "rank got USR1"; exit 75' USR1
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT, $GLOO_SOCKET_IFNAME: $*"
touch "$STARTED"
for _ in $(seq "$FAKE_TENTHS"); do sleep 0.1; done
statuses=($FAKE_STATUSES)
if [[ ${statuses[$RANK]} == KILL ]]; then kill -KILL $$; fi
exit "${statuses[$RANK]}"
"""
FAKE_CONTAINER = """#!/bin/bash
echo "container $1 $2" >> "$CALLS"
shift 2
exec "$@"
"""


class Job:
    """A batch script started as Slurm would start it, with stand-ins on its PATH."""

    def __init__(
        self,
        root: Path,
        folder: Path,
        statuses: str = "0 0",
        tenths: int = 0,
        *,
        command: Sequence[str] = ("ice_3b.sh", "--set", "run.name=a b"),
        **environment: str,
    ) -> None:
        stand_ins = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "sinfo": FAKE_SINFO, "python": FAKE_PYTHON}
        for name, content in {**stand_ins, "contain": FAKE_CONTAINER}.items():
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        self.run, self.calls, self.started = folder / "run", folder / "calls", folder / "started"
        self.node_state = folder / "node_state"
        self.node_state.write_text("allocated")
        (self.run / "slurm").mkdir(parents=True, exist_ok=True)
        if not (self.run / "slurm" / "retries.json").exists():
            self.set_retries(step=-1, without_progress=0)
        self.process = subprocess.Popen(
            ["bash", root / "slurm" / command[0], *command[1:]],
            env={
                "PATH": f"{folder}:{os.environ['PATH']}",
                "REAL_PYTHON": sys.executable,
                "ICE_PYTHON": str(folder / "python"),
                "ICE_POLL_SECONDS": "0.2",
                "CALLS": str(self.calls),
                "STARTED": str(self.started),
                "SILENT": str(folder / "silent"),
                "NODE_STATE": str(self.node_state),
                "RUN": str(self.run),
                "FAKE_STATUSES": statuses,
                "FAKE_TENTHS": str(tenths),
                "JOB_STATE": "RUNNING",
                "EXCLUDED": "(null)",
                "SLURM_SUBMIT_DIR": str(root),
                "SLURM_JOB_ID": "54321",
                "SLURM_JOB_NODELIST": "node[7-8]",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_NTASKS": "2",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def set_retries(self, step: int, without_progress: int) -> None:
        state = {"job": "54321", "step": step, "without_progress": without_progress}
        (self.run / "slurm" / "retries.json").write_text(json.dumps(state))

    def wait_for_start(self) -> None:
        deadline = time.monotonic() + 60
        while not self.started.exists():
            assert time.monotonic() < deadline, "the rank did not start"
            time.sleep(0.02)

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=120)
        return self.process.returncode, output

    @property
    def was_requeued(self) -> bool:
        return "scontrol requeue 54321" in self.calls.read_text()


def test_ranks_find_each_other_and_arguments_arrive_whole(repository_root: Path, tmp_path: Path) -> None:
    job = Job(repository_root, tmp_path, ICE_INTERFACE="ib0", ICE_SRUN_ARGS="--mpi=none\n--label")
    status, output = job.finish()
    assert status == 0, output
    training = "pretrain/main.py --config configs/ice_3b.json --set run.name=a b"
    assert f"rank 1 of 2, local 1, node7:26321, ib0: {training}" in output
    assert "--mpi=none --label bash -c" in job.calls.read_text()
    assert "--job 54321 --tasks 2 --config configs/ice_3b.json --set run.name=a b" in job.calls.read_text()


CELL = {"SLURM_ARRAY_JOB_ID": "54321", "SLURM_ARRAY_TASK_ID": "3", "PLAN": "runs/s/c/plan.json"}


@pytest.mark.parametrize(("status", "requeued"), [("0", False), ("75", True), ("1", True), ("78", False)])
def test_a_task_of_an_array_trains_its_cell_and_requeues_itself_alone(
    repository_root: Path, tmp_path: Path, status: str, requeued: bool
) -> None:
    command = ("scaling.sh", "configs/s.json")
    job = Job(repository_root, tmp_path, f"{status} {status}", command=command, **CELL)
    ended, output = job.finish()
    assert ended == int(status), output
    calls = job.calls.read_text()
    assert "sweep configs/s.json --cell 3" in calls
    assert "begin --job 54321_3 --tasks 2 --config runs/s/c/plan.json" in " ".join(calls.split())
    assert "pretrain/main.py --config runs/s/c/plan.json" in output
    # 54321 alone would be every task of the array.
    assert ("scontrol requeue 54321_3\n" in calls) == requeued
    assert "scontrol requeue 54321\n" not in calls
    assert ("sweep configs/s.json --collect" in calls) == (status == "0")


def test_a_cell_that_needs_no_training_starts_no_rank(repository_root: Path, tmp_path: Path) -> None:
    cases = {
        "finished": ({**CELL, "PLAN": ""}, 0, "the cell is finished"),
        "refused": ({**CELL, "SWEEP_STATUS": "78"}, 78, "the sweep was not accepted"),
        "no array": ({"PLAN": "p"}, 78, "not a job array; python launch/sweep.py configs/s.json --executor slurm"),
    }
    for name, (environment, status, text) in cases.items():
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        job = Job(repository_root, folder, command=("scaling.sh", "configs/s.json"), **environment)
        ended, output = job.finish()
        assert ended == status, output
        assert text in output
        assert not job.started.exists()


def test_a_requeued_job_meets_on_another_port(repository_root: Path, tmp_path: Path) -> None:
    _, output = Job(repository_root, tmp_path, SLURM_RESTART_COUNT="2").finish()
    assert "node7:26523" in output


def test_every_python_runs_in_the_container(repository_root: Path, tmp_path: Path) -> None:
    job = Job(repository_root, tmp_path, "1 1", ICE_CONTAINER_ARGS="contain\nan image\n--nv", ICE_PYTHON="python")
    assert job.finish()[0] == 1
    assert job.was_requeued
    assert job.calls.read_text().count("container an image --nv") == 4  # begin, two ranks, end


@pytest.mark.parametrize(
    ("statuses", "status", "requeued"),
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("75 KILL", 75, True),
        ("1 75", 75, True),
        ("78 78", 78, False),
        ("75 78", 78, False),
        ("KILL 78", 78, False),
        ("1 1", 1, True),
        ("1 KILL", 137, True),
        ("KILL KILL", 137, True),
    ],
)
def test_what_becomes_of_the_job(
    repository_root: Path, tmp_path: Path, statuses: str, status: int, requeued: bool
) -> None:
    job = Job(repository_root, tmp_path, statuses)
    ended, output = job.finish()
    assert ended == status, output
    assert job.was_requeued == requeued, output


def test_an_srun_that_returns_0_after_a_node_failure_is_not_believed(repository_root: Path, tmp_path: Path) -> None:
    job = Job(repository_root, tmp_path, "KILL KILL", SRUN_STATUS="0")
    assert job.finish()[0] == 1
    assert job.was_requeued


def test_a_refused_configuration_starts_no_rank(repository_root: Path, tmp_path: Path) -> None:
    job = Job(repository_root, tmp_path, BEGIN_STATUS="78")
    assert job.finish()[0] == 78
    assert not job.started.exists()
    assert not job.was_requeued


def test_a_job_that_never_gets_on_is_given_up(repository_root: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    state = {"job": "54321", "step": -1, "without_progress": 2}
    (tmp_path / "run" / "slurm" / "retries.json").write_text(json.dumps(state))
    assert Job(repository_root, tmp_path, "1 1").finish()[0] == 1
    job = Job(repository_root, tmp_path, "75 75")
    (tmp_path / "calls").write_text("")
    status, output = job.finish()
    assert status == 75
    assert not job.was_requeued
    assert "error: 4 starts in a row" in output


def test_usr1_saves_and_requeues_and_term_saves_and_ends(repository_root: Path, tmp_path: Path) -> None:
    for number, requeued in ((signal.SIGUSR1, True), (signal.SIGTERM, False)):
        folder = tmp_path / number.name
        folder.mkdir()
        job = Job(repository_root, folder, "1 1", tenths=1000)
        job.wait_for_start()
        time.sleep(0.5)  # the second rank
        job.process.send_signal(number)
        status, output = job.finish()
        assert output.count("rank got USR1") == 2, output
        assert status == 75
        assert job.was_requeued == requeued, output


@pytest.mark.parametrize(("state", "restarts"), [("RUNNING", "1"), ("CANCELLED", "0"), ("COMPLETING", "0")])
def test_a_start_that_slurm_has_given_up_leaves_the_job_alone(
    repository_root: Path, tmp_path: Path, state: str, restarts: str
) -> None:
    job = Job(repository_root, tmp_path, "1 1", JOB_STATE=state, SLURM_RESTART_COUNT=restarts)
    status, output = job.finish()
    assert status == 1
    assert not job.was_requeued
    assert "left alone" in output
    assert json.loads((job.run / "slurm" / "retries.json").read_text())["without_progress"] == 0


def test_a_controller_that_does_not_answer_is_asked_again(repository_root: Path, tmp_path: Path) -> None:
    (tmp_path / "silent").touch()
    job = Job(repository_root, tmp_path, "75 75")
    job.finish()
    assert not (tmp_path / "silent").exists()
    assert job.was_requeued


def test_nodes_that_failed_preflight_are_excluded_besides_those_that_are(repository_root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "preflight.json").write_text(json.dumps({"bad_hosts": ["node8.cluster"]}))
    job = Job(repository_root, tmp_path, "1 1", EXCLUDED="node[1-2]")
    job.finish()
    calls = job.calls.read_text()
    assert "scontrol update JobId=54321 ExcNodeList=node[1-2],node8\n" in calls
    assert calls.index("scontrol requeue") < calls.index("scontrol update")


def test_an_srun_that_does_not_return_is_ended_once_no_node_is_silent(repository_root: Path, tmp_path: Path) -> None:
    job = Job(repository_root, tmp_path, "75 75", HANG_SRUN="yes", ICE_WAIT_SECONDS="4")
    job.node_state.write_text("allocated*")
    job.wait_for_start()
    time.sleep(9)
    assert job.process.poll() is None
    job.node_state.write_text("allocated")
    status, output = job.finish()
    assert "no answer from node8; waiting until Slurm declares it DOWN" in output
    assert "srun got TERM" in output
    assert status == 75
    assert job.was_requeued


def test_a_silent_node_is_waited_for_no_longer_than_asked(repository_root: Path, tmp_path: Path) -> None:
    job = Job(repository_root, tmp_path, "1 1", HANG_SRUN="yes", ICE_WAIT_SECONDS="2", ICE_NODE_FAIL_SECONDS="6")
    job.node_state.write_text("down*")
    status, output = job.finish()
    assert "no answer from node8" in output
    assert status in (137, 143)
    assert job.was_requeued


def test_without_an_environment_the_job_says_what_to_do(repository_root: Path, tmp_path: Path) -> None:
    status, output = Job(repository_root, tmp_path, ICE_PYTHON="/nonexistent/python").finish()
    assert status == 78
    assert "make setup" in output
