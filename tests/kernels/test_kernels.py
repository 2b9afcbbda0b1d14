"""Triton kernels without a GPU: their numbers under the interpreter, and their machine code for the GPUs we name.

They need Triton and stk, which the suite's environment does without: ``setup.sh`` puts them in a folder of their own
(``requirements.txt`` says why), and each script here runs once, in a process that sees it. ``.ci/run`` does the set-up.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernels

HERE = Path(__file__).parent
INTERPRETED = ("megablocks_equals_the_default",)


@pytest.fixture(scope="session")
def kernel_path(repository_root: Path) -> str:
    """What PYTHONPATH must hold for a process to import triton and stk; skips where they are not installed."""
    folder = repository_root / ".venv" / "kernels"
    wanted, complete = HERE / "requirements.txt", folder / ".complete"
    if complete.exists() and complete.read_bytes() == wanted.read_bytes():
        return os.pathsep.join((str(repository_root), str(folder)))
    if all(importlib.util.find_spec(name) for name in ("stk", "triton")):  # the megablocks extra
        return str(repository_root)
    pytest.skip("needs triton and stanford-stk: tests/kernels/setup.sh installs them in a folder of their own")


def outcomes_of(script: str, kernel_path: str, **environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, HERE / script],
        env=os.environ | {"PYTHONPATH": kernel_path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.fixture(scope="module")
def interpreted(kernel_path: str) -> dict[str, str]:
    return outcomes_of("interpreted.py", kernel_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("check", INTERPRETED)
def test_under_the_interpreter(interpreted: dict[str, str], check: str) -> None:
    assert interpreted[check] == "equal", interpreted[check]
    assert interpreted.keys() == set(INTERPRETED)
