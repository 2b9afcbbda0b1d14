"""``srun --mpi=pmix`` without any of our scripts: ranks find each other through MPI."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from slurm_jobs import submit

SHOW_PLACE = """
import os
from launch.environment import discover_place
place = discover_place()
names = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")
words = ["place", str(place.rank), str(place.world_size), *(os.environ[name] for name in names)]
os.write(1, (" ".join(words) + chr(10)).encode())
"""


@pytest.mark.slurm
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is missing: pip install mpi4py")
def test_ranks_of_srun_find_each_other_through_pmix(cluster: None, tmp_path: Path, repository_root: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW_PLACE)
    job = submit(
        repository_root,
        tmp_path / "job.log",
        *("--nodes=2", "--ntasks-per-node=2", f"--wrap=srun --mpi=pmix python {tmp_path}/show.py"),
        PYTHONPATH=os.pathsep.join([str(repository_root), os.environ.get("PYTHONPATH", "")]),
    )
    try:
        assert job.wait_for_end(120) == "COMPLETED", job.text()
        first = job.nodes[0]
    finally:
        job.cancel()
    lines = sorted(line.split() for line in job.text().splitlines() if line.startswith("place"))
    port = lines[0][-1]
    ranks = [(str(rank), str(rank % 2)) for rank in range(4)]
    assert lines == [["place", rank, "4", rank, local, rank, local, first, port] for rank, local in ranks]
