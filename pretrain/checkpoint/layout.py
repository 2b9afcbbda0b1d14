"""Names below ``checkpoints/``, and which folders there are checkpoints.

``step_00000200``           a checkpoint, once it holds a manifest
``step_00000200.replaced``  the same step's older one, while a newer one takes its name; a checkpoint too
``partial_step_...``        a save that is being written
``dead_partial_step_...``   what an earlier start of the run left of one; the next save removes it
``universal_step_...``      a checkpoint's form for other ranks, made when one is needed
``making_universal_...``    one that is being made
``latest``                  the newest one's name, for people; nothing here relies on it
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"
LATEST = "latest"
STATE = "state.json"
BIASES = "biases.safetensors"
ENGINE = "engine"
WEIGHTS = "weights"
REPLACED = ".replaced"
PARTIAL = "partial_"
DEAD = "dead_"
UNIVERSAL = "universal_"
MAKING_UNIVERSAL = "making_universal_"

_STEP_FOLDER = re.compile(rf"step_(\d+)({re.escape(REPLACED)})?")


def step_folder_name(step: int) -> str:
    """Sorts by step, up to 99,999,999."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _STEP_FOLDER.fullmatch(checkpoint.name)
    if match is None:
        raise ValueError(f"{checkpoint}: not a checkpoint's name")
    return int(match.group(1))


def rank_file(rank: int) -> str:
    """The file of a rank's random generators."""
    return f"rank_{rank:05d}.pt"


def committed(folder: Path) -> list[Path]:
    """Folders with a manifest, oldest first; of one step, the replaced one first."""
    found = [path.parent for path in folder.glob(f"step_*/{MANIFEST}") if _STEP_FOLDER.fullmatch(path.parent.name)]
    return sorted(found, key=lambda path: (step_of(path), not path.name.endswith(REPLACED)))


def unfinished(folder: Path) -> list[Path]:
    """Folders of saves that were not committed, those of a save that is going on included."""
    return sorted(path for prefix in (PARTIAL, DEAD) for path in folder.glob(f"{prefix}*"))
