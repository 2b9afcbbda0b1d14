"""MegaBlocks' kernels under Triton's interpreter, in a process of its own: that is chosen when triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from model import megablocks

COMPARE = """
import torch
from model.gradient_sum import summed_gradients
from model.grouped_product import grouped_mm
from model.megablocks import megablocks

torch.manual_seed(0)
product = megablocks()
for sizes in ([128, 0, 256], [0, 0, 128]):
    rows = torch.randn(512, 128, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(3, 256, 128) / 11)
    offsets = torch.tensor(sizes).cumsum(0).int()
    used = sum(sizes)
    factor = torch.randn(used, 256)
    results = []
    for backend in (grouped_mm, product):
        with summed_gradients([weight]):
            output = backend(rows, weight, offsets)
        results.append((output[:used], *torch.autograd.grad((output[:used] * factor).sum(), (rows, weight))))
    for expected, actual in zip(*results):
        n = used if len(actual) == 512 else len(actual)
        error = (actual[:n] - expected[:n]).abs().max() / expected[:n].abs().max()
        assert error < 1e-6, error
try:
    product(torch.randn(128, 64), torch.randn(3, 256, 64), torch.tensor([128, 128, 128]).int())
except ValueError as error:
    assert "64 inputs" in str(error), error
else:
    raise AssertionError("64 inputs were accepted")
assert product(torch.zeros(0, 128), torch.randn(3, 256, 128), torch.zeros(3).int()).shape == (0, 256)
"""


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("stk", "triton")), reason="needs the megablocks extra"
)
def test_megablocks_equals_the_default_forward_and_backward() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_its_packages_it_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stk", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"ice-pretrain\[megablocks\]\""):
        megablocks.megablocks()
