"""Checkpoints that are whole or absent, written behind the training loop's back.

``checkpoints/step_00000200/`` holds::

    engine/            DeepSpeed's own files: weights, optimizer, one part a rank
    weights/           safetensors under the plain model's names, and the model's config (checkpoint.plain_weights)
    rank_00000.pt      each rank's random generators
    biases.safetensors the routers' selection biases, fp32
    state.json         step, loader position, tokens, W&B id, and what model, data and topology this belongs to
    manifest.json      sha256 and size of every other file: written last

A save copies what must be written into host memory (``snapshot``), and a thread of each rank writes it (``background``)
into a folder that no reader looks at. When every rank's share is on the disk and was read back (``share``), the first
rank commits: manifest, one rename to the final name, ``checkpoints/latest`` (``commit``), then removes what is no
longer kept (``retention``). A start of a run takes a new generation (``fence``), and a process of an older one commits
nothing. Loading takes the newest checkpoint whose files all have their recorded hash (``manifest``) and unpickles
nothing but data (``unpickling``).
"""

from pretrain.checkpoint.checkpointer import Checkpointer
from pretrain.checkpoint.errors import CheckpointError, SaveFailedError, StaleRunError
from pretrain.checkpoint.fence import Fence
from pretrain.checkpoint.layout import ENGINE, LATEST, MANIFEST, STATE, WEIGHTS, step_folder_name
from pretrain.checkpoint.manifest import find_damage, newest_valid_checkpoint
from pretrain.checkpoint.state import RunIdentity, TrainingState

__all__ = [
    "ENGINE",
    "LATEST",
    "MANIFEST",
    "STATE",
    "WEIGHTS",
    "CheckpointError",
    "Checkpointer",
    "Fence",
    "RunIdentity",
    "SaveFailedError",
    "StaleRunError",
    "TrainingState",
    "find_damage",
    "newest_valid_checkpoint",
    "step_folder_name",
]
