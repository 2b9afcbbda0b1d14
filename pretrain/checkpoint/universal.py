"""A checkpoint for any number of ranks: made from one of certain ranks, once, and kept beside it.

``universal_step_00000200/`` holds the engine's state of ``step_00000200/`` in DeepSpeed's universal format
(``pretrain/universal_format.py``), a note of what it was made from, and a manifest of its own. It is made under another
name and renamed when it is whole, so a crash leaves nothing that looks like one. Everything else that a resume needs
(biases, sample position, generators) does not depend on the ranks and is taken from the checkpoint itself.

Making one reads and writes the checkpoint once, in one process: hours for a terabyte. ``python launch/reshape.py`` does
it ahead, with several workers.
"""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path

from launch.files import fsync_path, sha256_of, write_json_atomically
from pretrain.checkpoint.hashed_file import FileEntry
from pretrain.checkpoint.layout import ENGINE, MAKING_UNIVERSAL, MANIFEST, UNIVERSAL
from pretrain.checkpoint.manifest import write_manifest

SOURCE = "made_from.json"


def universal_folder(checkpoint: Path) -> Path:
    """Where the universal form of ``checkpoint`` is kept."""
    return checkpoint.with_name(UNIVERSAL + checkpoint.name)


def find_universal(checkpoint: Path) -> Path | None:
    """The universal form of ``checkpoint`` if there is one, made from these very files; its hashes are not looked at.

    One that was made from other files of the same name is none.
    """
    folder = universal_folder(checkpoint)
    try:
        made_from = json.loads((folder / SOURCE).read_text())["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if (folder / MANIFEST).exists() and made_from == sha256_of(checkpoint / MANIFEST) else None


def make_universal(checkpoint: Path, workers: int = 1) -> Path:
    """Convert ``checkpoint``, of ZeRO stage 1, 2 or 3 and known to be good, with ``workers`` processes; the folder."""
    from pretrain.universal_format import write_universal

    making = checkpoint.with_name(f"{MAKING_UNIVERSAL}{checkpoint.name}_{secrets.token_hex(4)}")
    try:
        write_universal(checkpoint / ENGINE, making / ENGINE, workers)
        write_json_atomically(
            making / SOURCE, {"checkpoint": checkpoint.name, "manifest_sha256": sha256_of(checkpoint / MANIFEST)}
        )
        entries = {}
        for path in sorted(making.rglob("*")):
            fsync_path(path)
            if path.is_file():
                entries[str(path.relative_to(making))] = FileEntry(sha256_of(path), path.stat().st_size)
        write_manifest(making, entries)
        _remove_whole(checkpoint)
        making.rename(universal_folder(checkpoint))
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    fsync_path(checkpoint.parent)
    return universal_folder(checkpoint)


def remove_universal(checkpoint: Path) -> None:
    """Remove the universal form of ``checkpoint``, if there is one, and what attempts at one have left."""
    for attempt in checkpoint.parent.glob(f"{MAKING_UNIVERSAL}{checkpoint.name}_*"):
        shutil.rmtree(attempt)
    _remove_whole(checkpoint)


def _remove_whole(checkpoint: Path) -> None:
    folder = universal_folder(checkpoint)
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
