"""tests/conftest.py: where all tests are required, a skipped or absent one fails the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MARKERS = ("multirank", "slurm", "mount", "demo", "kernels", "harness")
RUNS = "import pytest\n" + "".join(f"@pytest.mark.{name}\n" for name in MARKERS) + "def test_runs(): pass\n"


def run_suite(repository_root: Path, folder: Path, source: str, strict: bool) -> subprocess.CompletedProcess[str]:
    shutil.copy(repository_root / "tests" / "conftest.py", folder / "conftest.py")
    shutil.copy(repository_root / "pyproject.toml", folder / "pyproject.toml")
    (folder / "test_it.py").write_text(source)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "test_it.py", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "ICE_REQUIRE_ALL_TESTS": "1" if strict else "0"},
        capture_output=True,
        text=True,
    )


def test_a_suite_in_which_all_ran_passes(repository_root: Path, tmp_path: Path) -> None:
    result = run_suite(repository_root, tmp_path, RUNS, strict=True)
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "source",
    [
        "@pytest.mark.multirank\ndef test_it(): pytest.skip('no second process')\n",
        "@pytest.mark.slurm\n@pytest.mark.skipif(True, reason='no Slurm')\ndef test_it(): pass\n",
        "@pytest.fixture\ndef ranks(): pytest.skip('none')\n@pytest.mark.multirank\ndef test_it(ranks): pass\n",
        "pytestmark = pytest.mark.multirank\npytest.importorskip('no_such_module')\n",
    ],
)
def test_a_skipped_required_test_fails_only_where_all_are_required(
    repository_root: Path, tmp_path: Path, source: str
) -> None:
    result = run_suite(repository_root, tmp_path, RUNS + source, strict=True)
    assert result.returncode != 0, result.stdout
    assert "must not be skipped here" in result.stdout
    relaxed = run_suite(repository_root, tmp_path, RUNS + source, strict=False)
    assert relaxed.returncode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), relaxed.stdout


def test_another_skipped_test_is_no_failure(repository_root: Path, tmp_path: Path) -> None:
    source = RUNS + "def test_it(): pytest.skip('no GPU')\n@pytest.mark.demo\n@pytest.mark.xfail\ndef test_x(): 1 / 0\n"
    assert run_suite(repository_root, tmp_path, source, strict=True).returncode == 0


def test_the_absence_of_required_tests_fails(repository_root: Path, tmp_path: Path) -> None:
    result = run_suite(repository_root, tmp_path, "def test_it(): pass\n", strict=True)
    assert result.returncode == 1, result.stdout
    for name in MARKERS:
        assert f"no test marked {name} ran" in result.stdout
    assert "1 passed" in result.stdout.splitlines()[-1]
