"""Whole weights on disk: safetensors files under the plain model's names, with the architecture beside them.

What generation, evaluation and export read. Files hold at most ``MAX_FILE_BYTES``. They are described here and written
by whoever saves a checkpoint, so that both can happen at different times.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from launch.settings import BadInputError, parse_settings, read_json_object
from model import IceConfig, IceModel

MAX_FILE_BYTES = 4 * 2**30
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

WritesFile = Callable[[Any], object]  # called with something that has ``write(bytes or memoryview)``

SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def safetensors_file(tensors: Mapping[str, Tensor]) -> WritesFile:
    """A function that writes ``tensors`` (on the CPU) as safetensors.

    The format is a JSON header and the bytes (https://github.com/huggingface/safetensors#format). The library would put
    the whole file together in memory first, or needs a path; this hands each tensor's own memory to ``file.write``.
    """
    # The library's order: wide types first, so that every tensor is aligned to its type.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(file: Any) -> None:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, tensor in ordered:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return write


def weight_files(config: IceConfig, tensors: Iterable[tuple[str, Tensor]], is_first: bool) -> dict[str, WritesFile]:
    """The files of ``tensors`` and ``config`` by name, as functions that write them to an open file.

    The tensors stay in memory until then. Ranks other than the first only consume the iterable.
    """
    groups: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors:
        if not is_first:
            continue
        if groups[-1] and sum(each.nbytes for each in groups[-1].values()) + tensor.nbytes > MAX_FILE_BYTES:
            groups.append({})
        groups[-1][name] = tensor
    if not is_first:
        return {}
    files = {f"model-{number:05d}.safetensors": group for number, group in enumerate(groups)}
    where = {name: file for file, group in files.items() for name in group}
    return {
        **{file: safetensors_file(group) for file, group in files.items()},
        CONFIG: _json_file(config.model_dump(mode="json")),
        INDEX: _json_file({"weight_map": where}),
    }


def _json_file(value: Any) -> WritesFile:
    encoded = (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    return lambda file: file.write(encoded)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> IceModel:
    """The plain model with the weights in ``folder``, in evaluation mode on the CPU.

    Raises ``BadInputError`` when ``folder`` has no weights or they are not those of its config.
    """
    if not (folder / INDEX).is_file():
        raise BadInputError(f"{folder}: no weights; the run must train with checkpoint.plain_weights = true")
    config = parse_settings(IceConfig, read_json_object(folder / CONFIG), source=str(folder / CONFIG))
    where = json.loads((folder / INDEX).read_text())["weight_map"]
    with torch.device("meta"):
        model = IceModel(config)
    model.to_empty(device="cpu")
    state: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise BadInputError(f"{folder / INDEX}: {file!r} leads out of the folder")
        state.update(load_file(folder / file))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
        missing = [name for name in missing if name != "head.weight"]
    if missing or unexpected:
        raise BadInputError(f"{folder}: not the weights of its {CONFIG}: missing {missing}, unexpected {unexpected}")
    return model.to(dtype).eval()
