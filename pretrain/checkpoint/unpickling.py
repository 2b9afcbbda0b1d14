"""Pickle without its power: only data is ever restored from a checkpoint.

``torch.save`` writes pickle, and an unrestricted unpickler runs whatever a file asks for. Every load here is
``weights_only``: torch's own interpreter of the format, which knows tensors, plain containers and the few classes of
data that ``pretrain/engine.py`` names. Files are tried before the engine loads them, so that all ranks can refuse
together instead of one leaving the others in a collective; tensors are mapped, not read, so this costs milliseconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from launch.files import path_inside
from pretrain.checkpoint.manifest import manifest_names

PICKLED = ".pt"


def load_data(path: Path, mapped: bool = False) -> Any:
    """The object in a file of ``torch.save``, on the CPU; raises when it asks for anything that is not data."""
    return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)


def find_unsafe(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """The first file of this rank's share that holds more than data, and what; None when there is none."""
    names = [name for name in manifest_names(checkpoint) if name.endswith(PICKLED)]
    for name in names[rank::world_size]:
        try:
            load_data(path_inside(checkpoint, name), mapped=True)
        except Exception as error:  # the interpreter raises whatever a made-up file leads it to
            told = re.search(r"GLOBAL (\S+)", str(error))
            what = f"asks for {told.group(1)}" if told else f"is not plain data ({type(error).__name__})"
            return f"{name} {what}"
    return None
