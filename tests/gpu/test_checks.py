"""The checks for GPUs hold on this CPU, tiny; and each can fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import checks
import run_all
from checks import CHECKS, TINY


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_check_for_gpus_holds_on_the_cpu(check: Any) -> None:
    torch.manual_seed(0)
    assert isinstance(check(torch.device("cpu"), TINY), dict)


def test_a_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "grouped_mm", lambda rows, weight, ends: checks.loop(rows, weight, ends) * 1.01)
    checks.grouped_mm.row_alignment = 1
    with pytest.raises(AssertionError, match="grouped product off by"):
        checks.experts_are_multiplied_right(torch.device("cpu"), TINY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main([]) == 78
    assert "no CUDA device that torch sees" in capsys.readouterr().out
