"""Every Triton kernel that a run on a GPU launches, compiled to machine code without one: prints one JSON object.

The functions that launch them are called as they are, on CPU tensors of the sizes of a model; where Triton would launch
a kernel it only compiles it, specialised on those arguments, for the architecture of the moment. Nothing is computed.

Of each kernel: the target in its PTX, the bytes of its cubin (ptxas, which Triton brings, has assembled it) and of the
shared memory a block of it takes. ``test_kernels.py`` starts this and says what must be.
"""

from __future__ import annotations

import engine_kernels  # noqa: F401  (before DeepSpeed's modules)

# isort: split
import json
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import triton
from deepspeed.moe import ep_kernels
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from model.megablocks import MegaBlocks, megablocks
from model.moe import Choice, plan_dispatch
from pretrain.row_moves import TritonMoves

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 512, 2048, 1024, 8, 4


class NoDevice:
    """Stands in for Triton's driver: a device of ``architecture`` that nothing is run on."""

    architecture = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


compiled: list[Any] = []


def compile_instead_of_launching() -> None:
    """From here on a launch compiles; an autotuned kernel for the first and the last of its configurations."""
    stock_run = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = stock_run(self, *args, grid=grid, warmup=True, **options)
        compiled.append(kernel)
        return kernel

    def run_some(self: Any, *args: Any, **options: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in {id(config): config for config in (self.configs[0], self.configs[-1])}.values():
            self.fn.run(*args, **options, **config.all_kwargs())

    JITFunction.run, Autotuner.run = run, run_some


def row_moves(dtype: torch.dtype) -> None:
    """The engine's row kernels, with groups padded and not."""
    moves = TritonMoves()
    x = torch.empty(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    for top_k, alignment in ((TOP_K, 8), (1, 8)):
        chosen = torch.arange(TOKENS * top_k).view(TOKENS, top_k) % EXPERTS
        plan = plan_dispatch(Choice(chosen, torch.bincount(chosen.flatten())), alignment)
        rows = moves.dispatch(x, plan)
        gates = torch.ones(TOKENS, top_k, requires_grad=True)
        y = moves.combine(rows, plan, gates) if top_k > 1 else moves.collect(rows, plan)
        y.backward(torch.empty_like(y))


def permutation_indices(dtype: torch.dtype) -> None:
    """What AutoEP's own layer launches besides, where it runs (``LoopedExpertLayer.why_stock``)."""
    counts = torch.full((2 * EXPERTS,), 16, dtype=torch.int32)
    ep_kernels.generate_permute_indices(counts, EXPERTS, 2, 512, 8)


def megablocks_products(dtype: torch.dtype) -> None:
    """The three products of an expert matrix."""
    product: MegaBlocks = megablocks()
    offsets = torch.arange(1, EXPERTS + 1).mul(TOKENS).int()
    rows = torch.empty(EXPERTS * TOKENS, WIDTH, dtype=dtype)
    weight, grad = torch.empty(EXPERTS, HIDDEN, WIDTH, dtype=dtype), torch.empty(len(rows), HIDDEN, dtype=dtype)
    product.multiply(rows, weight, offsets)
    product.rows_gradient(grad, weight, offsets)
    product.add_weight_gradient(grad, rows, offsets, torch.empty_like(weight), True)


def torchao_blockwise(dtype: torch.dtype) -> None:
    """Of torchao, the kernels for the scales of ``fp8_blockwise``: quantisation of rows and weights, and the product.

    Its quantisation of a transposed weight does not compile with Triton 3.9 (it indexes a scalar); we call none of them
    yet (``model/fp8/gpu_kernels.py`` multiplies by cuBLASLt).
    """
    from torchao.prototype.blockwise_fp8_training import kernels

    x, weight = torch.empty(TOKENS, WIDTH, dtype=dtype), torch.empty(WIDTH, HIDDEN, dtype=dtype)
    rows, row_scales = kernels.triton_fp8_blockwise_act_quant_lhs(x)
    columns, column_scales = kernels.triton_fp8_blockwise_weight_quant_rhs(weight)
    kernels.triton_fp8_gemm_1x128_128x128(rows, columns, row_scales, column_scales, out_dtype=dtype)


LAUNCHES: tuple[tuple[Callable[[torch.dtype], None], tuple[torch.dtype, ...], tuple[int, ...]], ...] = (
    (row_moves, (torch.bfloat16, torch.float32), (80, 90, 100)),
    (permutation_indices, (torch.int32,), (90,)),
    (megablocks_products, (torch.bfloat16,), (80, 90)),
    (torchao_blockwise, (torch.bfloat16,), (90,)),
)


def main() -> None:
    """Compile all, or those named on the command line."""
    device = NoDevice()
    triton.runtime.driver.set_active(device)
    compile_instead_of_launching()
    report: dict[str, Any] = {}
    for launch, dtypes, architectures in LAUNCHES:
        if len(sys.argv) > 1 and launch.__name__ not in sys.argv[1:]:
            continue
        for dtype in dtypes:
            for device.architecture in architectures:
                name = f"{launch.__name__} {str(dtype).removeprefix('torch.')} sm_{device.architecture}"
                compiled.clear()
                try:
                    launch(dtype)
                except Exception:
                    report[name] = traceback.format_exc()
                    continue
                report[name] = [
                    {
                        "kernel": kernel.name,
                        "target": re.search(r"^\.target (\S+)", kernel.asm["ptx"], re.MULTILINE).group(1),
                        "cubin_bytes": len(kernel.asm["cubin"]),
                        "shared_bytes": kernel.metadata.shared,
                    }
                    for kernel in {kernel.hash: kernel for kernel in compiled}.values()
                ]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
