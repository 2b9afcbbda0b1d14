"""Whole weights on disk: safetensors files under the plain model's names, with the architecture beside them.

What generation, evaluation and export read. Tensors arrive one at a time and are written in files of at most
``MAX_FILE_BYTES``, so that the first rank never holds the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launch.files import write_json_atomically
from launch.settings import BadInputError, parse_settings, read_json_object
from model import IceConfig, IceModel

MAX_FILE_BYTES = 4 * 2**30
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"


def write_weights(folder: Path, config: IceConfig, tensors: Iterable[tuple[str, Tensor]], is_first: bool) -> None:
    """Write ``tensors`` and ``config`` into ``folder``; ranks other than the first only consume the iterable."""
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
    pending: dict[str, Tensor] = {}
    pending_bytes, files, where = 0, 0, {}

    def flush() -> None:
        nonlocal pending, pending_bytes, files
        name = f"model-{files:05d}.safetensors"
        save_file(pending, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(pending, name))
        pending, pending_bytes, files = {}, 0, files + 1

    for name, tensor in tensors:
        if not is_first:
            continue
        if pending and pending_bytes + tensor.nbytes > MAX_FILE_BYTES:
            flush()
        pending[name] = tensor.contiguous()
        pending_bytes += tensor.nbytes
    if is_first:
        flush()
        write_json_atomically(folder / CONFIG, config.model_dump(mode="json"))
        write_json_atomically(folder / INDEX, {"weight_map": where})


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
