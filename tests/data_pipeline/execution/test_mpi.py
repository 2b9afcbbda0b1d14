"""The whole pipeline on three MPI ranks: the same bytes, and one line for an error."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataSettings, ExecutionSettings
from data_pipeline.dataset.reader import open_dataset
from data_pipeline.execution.executors import open_executor
from launch.settings import BadInputError

needs_mpi = pytest.mark.skipif(
    not shutil.which("mpirun") or not importlib.util.find_spec("mpi4py"),
    reason="mpirun or mpi4py is missing: apt-get install openmpi-bin; pip install -c constraints.txt mpi4py",
)


def mpirun(program: Path, settings: DataSettings, folder: Path) -> subprocess.CompletedProcess[str]:
    config = folder / "config.json"
    config.write_text(settings.model_dump_json())
    options = ["-n", "3", "--oversubscribe", "--bind-to", "none"]
    command = ["mpirun", *options, sys.executable, str(program / "data_pipeline" / "main.py")]
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [*command, "--config", str(config), "--executor", "mpi"],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_mpi
def test_three_ranks_prepare_the_same_bytes(
    tmp_path: Path,
    repository_root: Path,
    small_dataset: Path,
    small_corpus: Path,
    settings_for: Callable[..., DataSettings],
) -> None:
    output = tmp_path / "out"
    result = mpirun(repository_root, settings_for(small_corpus, output), tmp_path)
    assert result.returncode == 0, result.stderr
    assert (output / "manifest.json").read_bytes() == (small_dataset / "manifest.json").read_bytes()
    open_dataset(output, verify=True)
    logs = "".join(path.read_text() for path in output.glob(".stages/clean-*/logs/logs/*.log"))
    assert "Processing done for rank=2" in logs


@needs_mpi
def test_bad_input_on_one_rank_ends_all_with_its_line_and_status(
    tmp_path: Path,
    repository_root: Path,
    small_documents: list[dict[str, Any]],
    corpus_writer: Callable[..., None],
    settings_for: Callable[..., DataSettings],
) -> None:
    corpus_writer(tmp_path / "corpus", small_documents)
    (tmp_path / "corpus" / "part1.jsonl.gz").write_bytes(b"\x1f\x8b cut off")
    result = mpirun(repository_root, settings_for(tmp_path / "corpus", tmp_path / "out"), tmp_path)
    assert result.returncode == 78, result.stderr
    (line,) = [line for line in result.stderr.split("\n") if line.startswith("error:")]  # the others are mpirun's own
    assert "part1.jsonl.gz" in line
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_without_an_mpi_library_the_executor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with (
        pytest.raises(BadInputError, match=r"--executor mpi: mpi4py cannot be used .*pip install mpi4py"),
        open_executor("mpi", ExecutionSettings()),
    ):
        pass
