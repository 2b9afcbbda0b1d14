"""Triton kernels under its interpreter, on CPU tensors, beside plain torch: prints a JSON object, outcome by check.

A process of its own: whether kernels are interpreted (``TRITON_INTERPRET=1``) is decided when they are defined.
``test_kernels.py`` starts it.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import engine_kernels  # noqa: F401  (before DeepSpeed's modules)
import torch
from torch import Tensor
from triton.runtime import interpreter

from model.gradient_sum import summed_gradients
from model.grouped_product import grouped_mm
from model.megablocks import megablocks
from model.moe import Choice, DispatchPlan, plan_dispatch
from pretrain.row_moves import RowMoves, TorchMoves, TritonMoves


def _masks_are_boolean() -> None:
    """Mend triton 3.9's interpreter: it makes a comparison of scalars an integer, and then refuses it as a mask."""

    def mended(name: str) -> None:
        stock = getattr(interpreter.InterpreterBuilder, name)
        position = list(inspect.signature(stock).parameters).index("mask")

        def with_boolean_mask(*args: Any) -> Any:
            mask = args[position]
            boolean = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
            return stock(*args[:position], boolean, *args[position + 1 :])

        setattr(interpreter.InterpreterBuilder, name, with_boolean_mask)

    for name in ("create_masked_load", "create_masked_store"):
        mended(name)


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


def the_engines_kernels_move_rows_as_torch_does() -> None:
    """Every move of ``row_moves``, forward and backward, with groups padded and not, in fp32 and bf16."""
    tokens, experts, width = 24, 5, 200
    for top_k, alignment, dtype in ((3, 1, torch.float32), (3, 8, torch.float32), (2, 8, torch.bfloat16)):
        chosen = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)])  # the last one has none
        choice = Choice(chosen, torch.bincount(chosen.flatten(), minlength=experts))
        plan = plan_dispatch(choice, alignment)
        gates = torch.rand(tokens, top_k)
        one = Choice(chosen[:, :1], torch.bincount(chosen[:, 0], minlength=experts))
        single = plan_dispatch(one, alignment)
        for moved in (partial(_dispatch_and_combine, plan=plan), partial(_dispatch_and_collect, plan=single)):
            results = []
            for moves in (TorchMoves(), TritonMoves()):
                x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
                g = gates.clone().requires_grad_()
                y, rows = moved(moves, x, g)
                factor = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
                inputs = (x, g, rows) if moved.func is _dispatch_and_combine else (x, rows)
                results.append((y, *torch.autograd.grad(y, inputs, factor)))
            tolerance = 1e-6 if dtype is torch.float32 else 8e-3
            for expected, actual in zip(*results, strict=True):
                assert actual.dtype == expected.dtype
                assert actual.isfinite().all()
                torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    empty = TritonMoves().dispatch(
        torch.zeros(0, width), plan_dispatch(Choice(chosen[:0], torch.zeros(experts).long()))
    )
    assert empty.shape == (0, width)


def _dispatch_and_combine(moves: RowMoves, x: Tensor, gates: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    # The rows of padding are what an expert may make of them: their gradient must be zero, not undefined.
    rows = moves.dispatch(x, plan)
    return moves.combine(rows, plan, gates), rows


def _dispatch_and_collect(moves: RowMoves, x: Tensor, gates: Tensor, plan: DispatchPlan) -> tuple[Tensor, Tensor]:
    rows = moves.dispatch(x, plan)
    return moves.collect(rows, plan), rows


CHECKS: tuple[Callable[[], None], ...] = (megablocks_equals_the_default, the_engines_kernels_move_rows_as_torch_does)


def main() -> None:
    """Run the checks named on the command line, or all."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    _masks_are_boolean()
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
