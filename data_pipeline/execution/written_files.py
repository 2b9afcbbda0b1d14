"""Which files a block of code wrote: what makes the output of one piece of work known by name.

A piece's record has to list its files, so that a later run can take them over and leave behind what was half done.
Pipelines consist of other people's steps, which do not say what they write. Python does: an audit hook (PEP 578) sees
every file that is opened for writing, and every rename, wherever in the process it happens. It cannot see files that
native code opens by itself; ``Work.check_complete`` in pieces.py finds those.

Cost: one comparison of strings an audit event. A hook cannot be removed, so there is one a process, idle outside of
:func:`written_files`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

# Where the hook notes paths; None while nobody asks.
_noted: set[str] | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _noted is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING and isinstance(path, str | bytes):
            _noted.add(os.fsdecode(path))
    elif event in ("os.rename", "os.link"):
        path = arguments[1]
        if isinstance(path, str | bytes | os.PathLike):
            _noted.add(os.fsdecode(path))


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_hook)


@contextmanager
def written_files(folder: Path) -> Iterator[set[str]]:
    """A set that, after the body, holds the files below ``folder`` that the body wrote and that exist.

    Also after a body that raised. Names are relative to ``folder``. Files that another thread writes at the same time
    count too. One at a time in a process.
    """
    global _noted
    if _noted is not None:
        raise RuntimeError("written_files: is not to be nested")
    _install_hook()
    result: set[str] = set()
    _noted = set()
    try:
        yield result
    finally:
        noted, _noted = _noted, None
        root = Path(os.path.abspath(folder))
        for path in map(Path, noted):
            absolute = Path(os.path.abspath(path))
            if absolute.is_relative_to(root) and absolute.is_file():
                result.add(str(absolute.relative_to(root)))
