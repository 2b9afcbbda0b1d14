"""Data-sheet numbers of the accelerators a plan may be for, and of the eight-GPU nodes they come in.

Sources, all NVIDIA: "A100 Tensor Core GPU" data sheet (2021, 80 GB SXM), "H100 Tensor Core GPU" (SXM5), "H200 Tensor
Core GPU" (SXM), "Blackwell B200" in the HGX B200 data sheet; arithmetic is dense, without sparsity. Which FP8 recipes
have kernels: ``model/fp8/recipe.py``. NVLink is one direction. Network is the port a GPU has in the maker's own node:
200 Gb/s HDR (DGX A100), 400 Gb/s NDR (DGX H100, H200, B200); PCIe of the fourth and fifth generation, one direction, as
measured rather than as printed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Bytes, bytes a second, and operations a second of one accelerator."""

    name: str
    memory_bytes: float
    bf16_flops: float
    fp8_flops: float
    fp8_recipes: tuple[str, ...]  # that are not emulated
    hbm_bytes_per_second: float
    nvlink_bytes_per_second: float
    network_bytes_per_second: float
    host_bytes_per_second: float  # PCIe
    host_memory_bytes: float = 230e9  # a GPU's part of 2 TB a node, less what the system needs
    per_node: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 312e12, 0.0, (), 2.04e12, 300e9, 25e9, 25e9),
        Gpu("h100", 80e9, 989e12, 1979e12, ("fp8_rowwise", "fp8_blockwise"), 3.35e12, 450e9, 50e9, 50e9),
        Gpu("h200", 141e9, 989e12, 1979e12, ("fp8_rowwise", "fp8_blockwise"), 4.8e12, 450e9, 50e9, 50e9),
        Gpu("b200", 180e9, 2250e12, 4500e12, ("fp8_rowwise",), 8.0e12, 900e9, 50e9, 50e9),
    )
}
DEFAULT_GPU = "h100"
