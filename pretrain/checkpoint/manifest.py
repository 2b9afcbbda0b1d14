"""The manifest of a checkpoint: size and SHA-256 of every other file, and whether they still hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from launch.files import path_inside, sha256_of, write_json_atomically
from launch.settings import BadInputError
from pretrain.checkpoint.hashed_file import FileEntry
from pretrain.checkpoint.layout import MANIFEST, committed

FORMAT_VERSION = 1


def write_manifest(checkpoint: Path, files: Mapping[str, FileEntry]) -> None:
    """Name ``files`` (by path below ``checkpoint``) in a manifest, on the disk when this returns."""
    entries = {name: entry._asdict() for name, entry in files.items()}
    write_json_atomically(checkpoint / MANIFEST, {"format": FORMAT_VERSION, "files": entries})


def manifest_names(checkpoint: Path) -> list[str]:
    """The files of a checkpoint whose manifest was found good, sorted."""
    return sorted(json.loads((checkpoint / MANIFEST).read_text())["files"])


def find_damage(checkpoint: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """What is wrong with this rank's share of ``checkpoint``'s files, or None when sizes and hashes hold.

    Reads every byte of the share.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name in sorted(files)[rank::world_size]:
            path = path_inside(checkpoint, name)
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != files[name]["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {files[name]['bytes']}"
            if sha256_of(path) != files[name]["sha256"]:
                return f"{name} has another sha256 than {MANIFEST} records"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be used ({error})"
    return None


def newest_valid_checkpoint(folder: Path) -> Path:
    """The newest intact checkpoint below ``folder``, for a single process that reads it; ``BadInputError`` if none."""
    damage = "no checkpoint was committed there; train first"
    for candidate in reversed(committed(folder)):
        problem = find_damage(candidate)
        if problem is None:
            return candidate
        damage = f"{candidate.name}: {problem}"
    raise BadInputError(f"{folder}: no usable checkpoint: {damage}")
