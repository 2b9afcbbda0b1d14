"""Safetensors files of a bounded size, written a piece at a time.

A file begins with the names, types, shapes and places of its tensors, all known before the first byte of weights is
read. So memory holds one piece of one tensor (16 MiB of fp32) whatever the model's size. A tensor that is larger than
the bound has a file to itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.files import fsync_path
from pretrain.interchange.weight_source import StoredTensor
from pretrain.weights import SAFETENSORS_DTYPES

SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Output:
    """A tensor to be written: where from, under what name, in what type."""

    name: str
    tensor: StoredTensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.elements * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """A file on the disk."""

    name: str
    sha256: str
    bytes: int


def plan_files(outputs: Iterable[Output], shard_bytes: int) -> dict[str, list[Output]]:
    """Which tensors go to which file, in the given order; names as transformers writes them."""
    groups: list[list[Output]] = [[]]
    for output in outputs:
        if groups[-1] and sum(each.nbytes for each in groups[-1]) + output.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(output)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def write_files(
    folder: Path, files: dict[str, list[Output]], advance: Callable[[int], object] = lambda nbytes: None
) -> list[WrittenFile]:
    """Write ``files`` into ``folder``, synced; ``advance`` is called with the bytes of each piece."""
    return [_write_file(folder / name, outputs, advance) for name, outputs in files.items()]


def weight_index(files: dict[str, list[Output]]) -> dict[str, Any]:
    """The content of ``model.safetensors.index.json``."""
    return {
        "metadata": {"total_size": sum(output.nbytes for outputs in files.values() for output in outputs)},
        "weight_map": {output.name: name for name, outputs in files.items() for output in outputs},
    }


def _write_file(path: Path, outputs: list[Output], advance: Callable[[int], object]) -> WrittenFile:
    # Wide types first, so that every tensor is aligned to its type.
    ordered = sorted(outputs, key=lambda output: (-output.dtype.itemsize, output.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in ordered:
        start, end = end, end + output.nbytes
        dtype = SAFETENSORS_DTYPES[output.dtype]
        header[output.name] = {"dtype": dtype, "shape": list(output.tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    size = 0
    with path.open("xb") as file:

        def write(content: bytes | memoryview) -> None:
            nonlocal size
            file.write(content)
            digest.update(content)
            size += len(content)

        write(len(encoded).to_bytes(8, "little") + encoded)
        for output in ordered:
            for piece in output.tensor.pieces():
                content = _bytes_of(piece.to(output.dtype))
                write(content)
                advance(len(content))
    fsync_path(path)
    return WrittenFile(path.name, digest.hexdigest(), size)


def _bytes_of(flat: Tensor) -> memoryview:
    view: memoryview = flat.contiguous().view(torch.uint8).numpy().data
    return view
