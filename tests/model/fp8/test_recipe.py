"""Which kernels a device gets, and that it is said."""

from __future__ import annotations

import sys

import pytest
import torch

from model.fp8 import Emulated, Fp8GroupedProduct, RecipeName, choose_kernels
from model.fp8.gpu_kernels import BlockwiseKernels, RowwiseKernels


def on_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str = "12.9") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)


def test_bf16_is_no_fp8() -> None:
    assert choose_kernels("bf16", "cpu", torch.float32) is None


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise"])
def test_a_cpu_emulates_and_says_so_without_importing_torchao(
    recipe: RecipeName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    choice = choose_kernels(recipe, "cpu", torch.float32)
    assert choice is not None
    assert isinstance(choice.kernels, Emulated)
    assert choice.reason == f"{recipe} emulated: this CPU has no 8-bit products; numerics of FP8, no speed"


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "kind", "alignment", "said"),
    [
        ("fp8_rowwise", (8, 0), "12.9", Emulated, 1, "emulated: Some GPU is sm_80, 8-bit products need sm_89"),
        ("fp8_rowwise", (8, 9), "12.4", RowwiseKernels, 16, "experts one product each (no grouped kernel)"),
        ("fp8_rowwise", (9, 0), "12.4", RowwiseKernels, 16, "experts by torch._scaled_grouped_mm"),
        ("fp8_blockwise", (8, 9), "12.9", Emulated, 1, "emulated: Some GPU is sm_89, its kernels need sm_90"),
        ("fp8_blockwise", (9, 0), "12.8", Emulated, 1, "its kernels need CUDA 12.9, and torch was built with 12.8"),
        ("fp8_blockwise", (9, 0), "13.0", BlockwiseKernels, 128, "cuBLASLt, experts one product each"),
        ("fp8_blockwise", (10, 0), "13.0", Emulated, 1, "sm_100"),
    ],
)
def test_a_gpu_gets_what_it_has(
    monkeypatch: pytest.MonkeyPatch,
    recipe: RecipeName,
    capability: tuple[int, int],
    cuda: str,
    kind: type,
    alignment: int,
    said: str,
) -> None:
    on_gpu(monkeypatch, capability, cuda)
    choice = choose_kernels(recipe, "cuda", torch.bfloat16)
    assert choice is not None
    assert isinstance(choice.kernels, kind)
    assert Fp8GroupedProduct(choice.kernels).row_alignment == alignment
    assert said in choice.reason


def test_an_fp32_run_on_a_gpu_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0))
    choice = choose_kernels("fp8_rowwise", "cuda", torch.float32)
    assert choice is not None
    assert "this run's dtype is torch.float32" in choice.reason


def test_a_gpu_without_torchao_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.float8", raising=False)
    with pytest.raises(ImportError, match=r"fp8_rowwise needs torchao: pip install 'ice-pretrain\[fp8\]'"):
        choose_kernels("fp8_rowwise", "cuda", torch.bfloat16)
