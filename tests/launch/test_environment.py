"""A process's rank, from whichever launcher started it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import Place, discover_place, prepare_rendezvous
from launch.settings import BadInputError

needs_mpi = pytest.mark.skipif(
    not shutil.which("mpirun") or not importlib.util.find_spec("mpi4py"),
    reason="mpirun or mpi4py is missing: apt-get install openmpi-bin; pip install -c constraints.txt mpi4py",
)

SHOW_PLACE = """
import os, sys
from launch.environment import discover_place
place = discover_place()
assert discover_place() == place
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
words = ["place", str(place.rank), str(place.world_size), *(os.environ[name] for name in names)]
os.write(1, (" ".join(words) + chr(10)).encode())
"""


@pytest.mark.parametrize(
    ("variables", "place"), [({}, Place(0, 1)), ({"RANK": "3", "WORLD_SIZE": "8", "PMI_RANK": "5"}, Place(3, 8))]
)
def test_rank_is_found(variables: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert discover_place() == place
    assert place.is_first == (place.rank == 0)


def mpirun(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["-n", "3", "--oversubscribe", "--bind-to", "none"]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        ["mpirun", *options, sys.executable, str(program), *arguments],
        env={**os.environ, **root, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_mpi
@pytest.mark.multirank
def test_ranks_of_mpirun_agree_on_where_to_meet(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW_PLACE)
    result = mpirun(tmp_path / "show.py")
    assert result.returncode == 0, result.stderr
    lines = sorted(line.split() for line in result.stdout.splitlines() if line.startswith("place"))
    port = lines[0][-1]
    assert lines == [["place", r, "3", r, "3", r, "127.0.0.1", port] for r in ("0", "1", "2")]
    assert int(port) > 0


@needs_mpi
@pytest.mark.multirank
def test_a_mistake_of_the_user_is_one_line_under_mpirun(repository_root: Path) -> None:
    result = mpirun(repository_root / "pretrain" / "main.py", "--config", "configs/nowhere.json")
    assert result.returncode == 78, result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error:")] == [
        "error: configs/nowhere.json: no such file; name an existing one, such as those in configs/"
    ]


def test_without_mpi4py_a_rank_of_mpi_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMIX_RANK", "0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(BadInputError, match=r"started by MPI.*pip install mpi4py"):
        discover_place()


@pytest.mark.parametrize("variables", [{"RANK": "two", "WORLD_SIZE": "4"}, {"RANK": "4", "WORLD_SIZE": "4"}])
def test_impossible_ranks_end_in_one_line(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInputError, match="RANK"):
        discover_place()


def test_a_process_alone_gets_a_rendezvous_and_a_launched_one_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "keep")
    prepare_rendezvous(Place(0, 2))
    prepare_rendezvous(Place(0, 1))
    assert os.environ["MASTER_PORT"] == "keep"
    monkeypatch.delenv("MASTER_ADDR")
    prepare_rendezvous(Place(0, 1))
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(os.environ["MASTER_PORT"]) > 0
