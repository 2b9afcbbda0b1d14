"""One Slurm of six nodes for the session, and the modules beside the tests importable by name."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_jobs import local_slurm

CANNOT = ("missing:", "must run as root", "is refused here")
# KILL_WAIT is how long `scancel` leaves a job to save; 30 s is Slurm's own default.
SETTINGS = {"NODES": "6", "CPUS": "16", "GPUS": "8", "KILL_WAIT": "10"}


@pytest.fixture(scope="session")
def _slurm() -> Iterator[str]:
    """The cluster's SLURM_CONF."""
    # Not pytest's folder, which is the user's alone: munge wants its socket where everybody can get at it.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ice-slurm-") as folder:
        Path(folder).chmod(0o755)
        # Below the jobs' rendezvous ports, and not where a cluster beside this one is.
        port = str(random.SystemRandom().randrange(12000, 19000, 10))
        for name, value in {**SETTINGS, "DIR": folder, "PORT": port}.items():
            patch.setenv(f"LOCAL_SLURM_{name}", value)
        started = local_slurm("up")
        if any(reason in started.stderr for reason in CANNOT):
            pytest.skip(f"no Slurm here: {started.stderr.strip()}")
        try:
            assert started.returncode == 0, started.stderr
            yield started.stdout.strip().partition("=")[2]
        finally:
            local_slurm("down")


@pytest.fixture
def cluster(_slurm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six nodes of 16 CPUs and 8 pretended GPUs; SLURM_CONF is set for the test."""
    monkeypatch.setenv("SLURM_CONF", _slurm)
