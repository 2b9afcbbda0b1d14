"""The commit: the moment from which a checkpoint exists, and what follows it. The first rank's work.

The order is the proof that a crash at any instant leaves a loadable checkpoint: every file and folder is synced before
the manifest is written, the manifest before the folder gets its name, ``latest`` after that, and only then is anything
removed. An older checkpoint of the same step (a rollback trains steps again) steps aside under a name that readers
know, so that at no instant there is neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from launch.files import fsync_path, sha256_of, write_atomically
from pretrain.checkpoint.fence import Fence
from pretrain.checkpoint.hashed_file import FileEntry
from pretrain.checkpoint.layout import LATEST, MANIFEST, REPLACED, committed, step_folder_name, unfinished
from pretrain.checkpoint.manifest import write_manifest
from pretrain.checkpoint.retention import remove, superseded
from pretrain.checkpoint.share import CONTENT
from pretrain.config import CheckpointSection


def commit(partial: Path, step: int, entries: dict[str, FileEntry], fence: Fence) -> Path:
    """Make what lies in ``partial`` the checkpoint of ``step``; returns its folder.

    Every folder is synced here; files that no rank has claimed (an engine that offloads to NVMe copies its own) are
    synced and hashed, too.
    """
    content, folder = partial / CONTENT, partial.parent
    for path in sorted(content.rglob("*")):
        name = str(path.relative_to(content))
        if path.is_dir():
            fsync_path(path)
        elif name not in entries:
            fsync_path(path)
            entries[name] = FileEntry(sha256_of(path), path.stat().st_size)
    fence.check()
    write_manifest(content, entries)
    target = folder / step_folder_name(step)
    _make_way(target)
    content.rename(target)
    fsync_path(folder)
    write_atomically(folder / LATEST, f"{target.name}\n".encode())
    return target


def _make_way(target: Path) -> None:
    """Free the name ``target``: a checkpoint there keeps being one under another name, anything else is removed."""
    if not target.exists():
        return
    aside = target.with_name(target.name + REPLACED)
    if (target / MANIFEST).exists():
        if aside.exists():
            remove(aside)
        target.rename(aside)
    else:
        shutil.rmtree(target)


def clean_up(
    folder: Path, section: CheckpointSection, proven: list[Path], fence: Fence, say: Callable[[str], None]
) -> None:
    """Remove what the retention no longer keeps, and what dead saves have left.

    A folder that cannot be removed is named and stays for the next save: a checkpoint was committed all the same.
    """
    for doomed in [*superseded(committed(folder), section, proven), *unfinished(folder)]:
        fence.check()
        try:
            remove(doomed)
        except OSError as error:
            say(f"{doomed} could not be removed ({error}); the next save tries again")
