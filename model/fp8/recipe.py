"""Which FP8 recipe runs where: the settings' names, what this device can do of it, and the line that says so."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from model.fp8.products import BLOCKWISE, ROWWISE, Emulated, Kernels

RecipeName = Literal["bf16", "fp8_rowwise", "fp8_blockwise"]
RECIPES = {recipe.name: recipe for recipe in (ROWWISE, BLOCKWISE)}


class Fp8Choice(NamedTuple):
    """What multiplies, and the reason in a few words for the log."""

    kernels: Kernels
    reason: str


def choose_kernels(recipe: RecipeName, device_type: str, dtype: torch.dtype) -> Fp8Choice | None:
    """The kernels of ``recipe`` on a device ("cpu" or "cuda") in a run of ``dtype``; None for ``bf16``.

    A device without eight-bit products gets emulated ones: what the numbers do can be studied anywhere.

    Raises:
        ImportError: ``fp8_rowwise`` on a GPU without torchao.
    """
    if recipe == "bf16":
        return None
    if device_type != "cuda":
        return _emulated(recipe, f"this {device_type.upper()} has no 8-bit products")
    if dtype != torch.bfloat16:
        return _emulated(recipe, f"8-bit products give bf16, and this run's dtype is {dtype}")
    device, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if recipe == "fp8_rowwise":
        return _rowwise(device, capability)
    return _blockwise(device, capability, torch.version.cuda or "")


def _emulated(recipe: str, why: str) -> Fp8Choice:
    return Fp8Choice(Emulated(RECIPES[recipe]), f"{recipe} emulated: {why}; numerics of FP8, no speed")


def _rowwise(device: str, capability: tuple[int, int]) -> Fp8Choice:
    if capability < (8, 9):
        return _emulated("fp8_rowwise", f"{device} is sm_{capability[0]}{capability[1]}, 8-bit products need sm_89")
    # Imported late: torchao takes seconds and prints.
    from model.fp8.gpu_kernels import RowwiseKernels

    grouped = capability >= (9, 0)
    try:
        kernels = RowwiseKernels(grouped=grouped)
    except ImportError as error:
        raise ImportError(f"fp8_rowwise needs torchao: pip install 'ice-pretrain[fp8]' ({error})") from error
    experts = "experts by torch._scaled_grouped_mm" if grouped else "experts one product each (no grouped kernel)"
    return Fp8Choice(kernels, f"fp8_rowwise on {device}: linears by torchao, {experts}")


def _blockwise(device: str, capability: tuple[int, int], cuda: str) -> Fp8Choice:
    if capability != (9, 0):
        return _emulated("fp8_blockwise", f"{device} is sm_{capability[0]}{capability[1]}, its kernels need sm_90")
    if tuple(int(part) for part in cuda.split(".")[:2]) < (12, 9):
        return _emulated("fp8_blockwise", f"its kernels need CUDA 12.9, and torch was built with {cuda}")
    from model.fp8.gpu_kernels import BlockwiseKernels

    return Fp8Choice(BlockwiseKernels(), f"fp8_blockwise on {device}: cuBLASLt, experts one product each")
