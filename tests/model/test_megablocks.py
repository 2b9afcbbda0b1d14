"""The adapter's own checks; its numbers beside the default's are in ``tests/kernels``, which has the packages."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from model import megablocks
from model.megablocks import MegaBlocks


def test_without_its_packages_it_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stk", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"ice-pretrain\[megablocks\]\""):
        megablocks.megablocks()


@pytest.mark.parametrize(
    ("rows", "weight", "message"),
    [
        ((128, 64), (3, 256, 64), "64 inputs"),
        ((100, 128), (3, 256, 128), "100 rows"),
        ((128, 128), (3, 200, 128), "200 outputs"),
        # What each kernel addresses by an int32: the weight, the rows, the sparse blocks.
        ((128, 8192), (64, 4096, 8192), "64 x 4096 x 8192"),
        ((2**19, 4096), (2, 128, 4096), "524288 x 4096"),
        ((2**19, 128), (2, 4096, 128), "524288 x 4096"),
    ],
)
def test_sizes_that_the_kernels_cannot_address_are_refused(
    rows: tuple[int, ...], weight: tuple[int, ...], message: str
) -> None:
    product = MegaBlocks(SimpleNamespace())
    offsets = torch.zeros(weight[0], dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=message):
        product(torch.empty(rows, device="meta"), torch.empty(weight, device="meta"), offsets)
