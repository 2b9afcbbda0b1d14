"""A rank's share of a checkpoint on its way to the disk, and how it tells the first rank that it is there.

``partial_<label>/`` holds ``content/``, which becomes the checkpoint, and ``done/``, where each rank leaves a note with
the hashes of its files when they are synced and read back. Ranks agree through these notes alone: a writer thread that
took part in collectives would race with those of the training loop, and hang when a rank dies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from launch.files import write_json_atomically
from pretrain.checkpoint.hashed_file import FileEntry, HashedFile, read_back
from pretrain.weights import WritesFile

CONTENT = "content"
DONE = "done"


def write_share(
    partial: Path, rank: int, files: Mapping[str, WritesFile], go_on: Callable[[], None], verify: bool
) -> None:
    """Write ``files`` (by path below ``content/``), sync them, read them back when ``verify``, and leave the note.

    The folders are synced by the commit, all at once. ``go_on`` is called often, and may raise to give up.
    """
    content = partial / CONTENT
    entries = {}
    for name, write in files.items():
        path = content / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with HashedFile(path, go_on) as file:
            write(file)
        entries[name] = file.entry
    if verify:
        for name, entry in entries.items():
            go_on()
            read_back(content / name, entry)
    (partial / DONE).mkdir(exist_ok=True)
    write_json_atomically(partial / DONE / _note(rank), entries)


def shares_done(partial: Path, world_size: int) -> dict[str, FileEntry] | None:
    """Hash and size of every rank's files, or None while a note is missing."""
    notes = {_note(rank) for rank in range(world_size)}
    try:
        if not notes <= set(os.listdir(partial / DONE)):
            return None
    except FileNotFoundError:
        return None
    entries = {}
    for note in sorted(notes):
        written = json.loads((partial / DONE / note).read_text())
        entries.update({name: FileEntry(*entry) for name, entry in written.items()})
    return entries


def _note(rank: int) -> str:
    return f"rank_{rank:05d}.json"
