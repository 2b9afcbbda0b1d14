"""slurm/common.sh against stand-ins for srun and scontrol: ranks, rendezvous, and what becomes of the job.

What a real Slurm does with these scripts is not tested yet (docs/gpu.md).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

FAKE_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=3 SLURM_LOCALID=1
exec "$@"
"""
FAKE_SCONTROL = """#!/bin/bash
echo "$*" >> "$CALLS"
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; fi
"""
FAKE_PYTHON = """#!/bin/bash
trap 'echo "rank got USR1"; exit 75' USR1
echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, $MASTER_ADDR:$MASTER_PORT: $*"
touch "$STARTED"
for _ in $(seq "$FAKE_TENTHS"); do sleep 0.1; done
exit "$FAKE_STATUS"
"""


class Job:
    """A batch script started as Slurm would start it, with stand-ins on its PATH."""

    def __init__(self, root: Path, folder: Path, status: int = 0, tenths: int = 0, **environment: str) -> None:
        for name, content in {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "python": FAKE_PYTHON}.items():
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        self.calls, self.started = folder / "calls", folder / "started"
        self.process = subprocess.Popen(
            ["bash", root / "slurm" / "ice_3b.sh", "--set", "run.name=a b"],
            env={
                "PATH": f"{folder}:{os.environ['PATH']}",
                "ICE_PYTHON": str(folder / "python"),
                "CALLS": str(self.calls),
                "STARTED": str(self.started),
                "FAKE_STATUS": str(status),
                "FAKE_TENTHS": str(tenths),
                "SLURM_SUBMIT_DIR": str(root),
                "SLURM_JOB_ID": "54321",
                "SLURM_JOB_NODELIST": "node[7-8]",
                "SLURM_NTASKS": "16",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_start(self) -> None:
        deadline = time.monotonic() + 20
        while not self.started.exists():
            assert time.monotonic() < deadline, "the rank did not start"
            time.sleep(0.02)

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output

    @property
    def was_requeued(self) -> bool:
        return "requeue 54321" in self.calls.read_text()


def test_ranks_find_each_other_and_arguments_arrive_whole(repository_root: Path, tmp_path: Path) -> None:
    status, output = Job(repository_root, tmp_path).finish()
    assert status == 0, output
    expected = "rank 3 of 16, local 1, node7:26321: -u pretrain/main.py --config configs/ice_3b.json --set run.name=a b"
    assert expected in output


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True), (78, False)])
def test_only_a_preempted_job_is_requeued(repository_root: Path, tmp_path: Path, status: int, requeued: bool) -> None:
    job = Job(repository_root, tmp_path, status)
    assert job.finish()[0] == status
    assert job.was_requeued == requeued


def test_a_job_that_never_gets_on_is_given_up(repository_root: Path, tmp_path: Path) -> None:
    job = Job(repository_root, tmp_path, 75, SLURM_RESTART_COUNT="3", ICE_MAX_RESTARTS="3")
    assert job.finish()[0] == 75
    assert not job.was_requeued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_batch_shell_reaches_the_ranks(
    repository_root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    job = Job(repository_root, tmp_path, 1, tenths=100)
    job.wait_for_start()
    job.process.send_signal(number)
    status, output = job.finish()
    assert "rank got USR1" in output
    assert status == 75
    assert job.was_requeued


def test_without_an_environment_the_job_says_what_to_do(repository_root: Path, tmp_path: Path) -> None:
    status, output = Job(repository_root, tmp_path, ICE_PYTHON="/nonexistent/python").finish()
    assert status == 78
    assert "make setup" in output
