"""Files that are either whole or absent: atomic writes, checksums, and paths that cannot leave their folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a reader sees the old file or the new one, never a part, even after a crash."""
    # Random, since ranks on different machines can have the same process id and the same folder.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def as_json(value: Any) -> bytes:
    """``value`` as people read it: indented JSON with sorted keys, which is the same bytes for the same value."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def write_json_atomically(path: Path, value: Any) -> None:
    """``write_atomically`` of :func:`as_json`."""
    write_atomically(path, as_json(value))


def path_inside(folder: Path, name: str) -> Path:
    """``folder / name``, or ``ValueError`` when ``name`` does not name something inside ``folder``.

    Refused: the folder itself, an absolute path, and what leads out of it (``..``, a link) or nowhere (links in a
    circle, a NUL).
    """
    try:
        root = folder.resolve()
        path = (root / name).resolve()
    except RuntimeError as error:  # what pathlib raises for links in a circle, before Python 3.13
        raise ValueError(f"{name!r} in {folder}: {error}") from None
    if Path(name).is_absolute() or path == root or not path.is_relative_to(root):
        raise ValueError(f"{name!r} does not name anything inside {folder}")
    return path
