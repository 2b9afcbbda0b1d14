"""Which checkpoints stay: the last ones, every k-th for ever, the best by evaluation, and always a proven one.

*Proven* means that the bytes on the storage were seen to have the recorded hashes: those of a new checkpoint when they
were read back before its commit, or those of the one a resume has loaded. A manifest alone proves nothing about bytes
that have rotted since, so a removal never goes beyond what the proven one can stand in for: it is kept whatever the
numbers say. Hashing every kept checkpoint at every save would read terabytes to learn little more.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path

from launch.files import fsync_path
from pretrain.checkpoint.layout import MANIFEST, REPLACED, step_of
from pretrain.checkpoint.state import decode_state, read_record
from pretrain.checkpoint.universal import remove_universal
from pretrain.config import CheckpointSection


def superseded(checkpoints: list[Path], section: CheckpointSection, proven: Iterable[Path]) -> list[Path]:
    """Those of ``checkpoints`` (oldest first) that ``section`` no longer keeps."""
    current = [checkpoint for checkpoint in checkpoints if not checkpoint.name.endswith(REPLACED)]
    kept = {*proven, *current[-section.keep_last :]}
    if section.keep_every is not None:
        kept.update(each for each in current if step_of(each) % section.keep_every == 0)
    if section.keep_best is not None:
        kept.update(_best(current, section.keep_best))
    return [checkpoint for checkpoint in checkpoints if checkpoint not in kept]


def _best(checkpoints: list[Path], number: int) -> list[Path]:
    """The lowest validation bits a byte; of equals the newest. Only steps that were evaluated have a value."""
    values = {each: _validation_bits_per_byte(each) for each in checkpoints}
    evaluated = [each for each in checkpoints if math.isfinite(values[each])]
    return sorted(evaluated, key=lambda each: (values[each], -step_of(each)))[:number]


def _validation_bits_per_byte(checkpoint: Path) -> float:
    """Read from the checkpoint itself, so that a resumed run ranks what earlier ones saved."""
    try:
        value = decode_state(read_record(checkpoint)).validation_bits_per_byte
    except (OSError, ValueError, TypeError):
        return math.inf  # damaged: a resume would say so; it is not among the best
    return math.inf if value is None else value


def remove(checkpoint: Path) -> None:
    """Un-commit first, so that a crash in between leaves no half checkpoint that looks whole.

    Before it goes its form for other ranks, which would never be looked at again.
    """
    remove_universal(checkpoint)
    manifest = checkpoint / MANIFEST
    if manifest.exists():
        manifest.unlink()
        fsync_path(checkpoint)
    shutil.rmtree(checkpoint)
