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
from typing import Any

import pytest

pytestmark = pytest.mark.kernels

HERE = Path(__file__).parent
# Bytes of shared memory that one block may have: CUDA C programming guide, technical specifications.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
ROW_KERNELS = {"_gather_rows_kernel", "_weighted_restore_forward_kernel", "_weighted_restore_backward_kernel"}
COMPILED = {
    **{
        f"row_moves {dtype} {architecture}": ROW_KERNELS
        for dtype in ("bfloat16", "float32")
        for architecture in ("sm_80", "sm_90", "sm_100")
    },
    "permutation_indices int32 sm_90": {"_fill_indices_kernel"},
    "megablocks_products bfloat16 sm_80": {"_sdd_kernel", "_dsd_kernel"},
    "megablocks_products bfloat16 sm_90": {"_sdd_kernel", "_dsd_kernel"},
    "torchao_blockwise bfloat16 sm_90": {
        "triton_fp8_blockwise_act_quant_lhs_kernel",
        "triton_fp8_blockwise_weight_quant_rhs_kernel",
        "triton_fp8_gemm_1x128_128x128_kernel",
    },
}
INTERPRETED = ("megablocks_equals_the_default", "the_engines_kernels_move_rows_as_torch_does")


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


def outcomes_of(script: str, kernel_path: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, HERE / script],
        env=os.environ | {"PYTHONPATH": kernel_path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


@pytest.fixture(scope="module")
def interpreted(kernel_path: str) -> dict[str, str]:
    return outcomes_of("interpreted.py", kernel_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("check", INTERPRETED)
def test_under_the_interpreter(interpreted: dict[str, str], check: str) -> None:
    assert interpreted[check] == "equal", interpreted[check]
    assert interpreted.keys() == set(INTERPRETED)


@pytest.fixture(scope="module")
def compiled(kernel_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return outcomes_of("compiled.py", kernel_path, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("launch", COMPILED)
def test_what_a_gpu_would_launch_compiles_without_one(compiled: dict[str, Any], launch: str) -> None:
    kernels = compiled[launch]
    assert isinstance(kernels, list), kernels
    assert {kernel["kernel"] for kernel in kernels} == COMPILED[launch]
    architecture = launch.split()[-1]
    for kernel in kernels:
        # sm_90a and sm_100a are sm_90 and sm_100 with what only that architecture has.
        assert kernel["target"].rstrip("a") == architecture, kernel
        assert kernel["cubin_bytes"] > 0, kernel
        assert kernel["shared_bytes"] <= SHARED_BYTES[architecture], kernel


def test_every_launch_is_listed(compiled: dict[str, Any]) -> None:
    assert compiled.keys() == COMPILED.keys()
