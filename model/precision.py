"""Which number formats this machine is fast in.

A bf16 matrix product on a CPU without AVX512-BF16 or AMX runs some fifty times slower than fp32 (measured: 0.6 against
30 GFLOP/s on two cores), so ``auto`` asks the hardware instead of assuming, and says what it chose and why.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

DtypeName = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PrecisionChoice(NamedTuple):
    """A dtype's name, and the reason in a few words for the log."""

    name: DtypeName
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of weights and activations."""
        return DTYPES[self.name]


def choose_precision(requested: Literal["auto", "bf16", "fp16", "fp32"], device_type: str) -> PrecisionChoice:
    """Resolve ``precision.dtype`` for ``device_type`` ("cpu" or "cuda"); only ``auto`` looks at the hardware."""
    if requested != "auto":
        return PrecisionChoice(requested, "asked for by precision.dtype")
    if device_type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PrecisionChoice("bf16", f"native on {torch.cuda.get_device_name()}")
        return PrecisionChoice("fp32", f"{torch.cuda.get_device_name()} has no native bf16")
    if device_type == "cpu" and _cpu_is_fast_in_bf16():
        return PrecisionChoice("bf16", "this CPU has bf16 instructions")
    return PrecisionChoice("fp32", f"this {device_type} has no fast bf16")


def _cpu_is_fast_in_bf16() -> bool:
    # torch exposes these probes without the underscore only on some platforms; they are read, never set.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(hasattr(torch.cpu, probe) and getattr(torch.cpu, probe)() for probe in probes)
