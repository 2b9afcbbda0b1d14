"""Triton kernels under its interpreter, on CPU tensors, beside plain torch: prints a JSON object, outcome by check.

A process of its own: whether kernels are interpreted (``TRITON_INTERPRET=1``) is decided when they are defined.
``test_kernels.py`` starts it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable

import torch

from model.gradient_sum import summed_gradients
from model.grouped_product import grouped_mm
from model.megablocks import megablocks


def megablocks_equals_the_default() -> None:
    """Forward, both gradients, groups without rows, rows past the last group; and what it refuses."""
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
        for expected, actual in zip(*results, strict=True):
            n = used if len(actual) == 512 else len(actual)
            error = float((actual[:n] - expected[:n]).abs().max() / expected[:n].abs().max())
            assert error < 1e-6, error
    assert product(torch.zeros(0, 128), torch.randn(3, 256, 128), torch.zeros(3).int()).shape == (0, 256)


CHECKS: tuple[Callable[[], None], ...] = (megablocks_equals_the_default,)


def main() -> None:
    """Run the checks named on the command line, or all."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    outcomes = {}
    for check in CHECKS:
        if len(sys.argv) > 1 and check.__name__ not in sys.argv[1:]:
            continue
        torch.manual_seed(0)
        try:
            check()
            outcomes[check.__name__] = "equal"
        except Exception:
            outcomes[check.__name__] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
