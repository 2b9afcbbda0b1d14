"""Every operation that changes files, numbered as it happens; a process can be made to die at any of them.

Python's own functions are replaced (``open`` for writing and its file's ``write``, ``os.fsync``, ``os.rename`` ...). An
audit hook of the interpreter sees opens and changes of names by a way of its own: the two counts must agree, so nothing
can slip past the numbering; and since compiled code could write past both, tests also compare the bytes of every file
with those that were seen going by.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

DIED = 77
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What the interpreter's audit hook calls each of them; None: it has no event.
NAMES = {
    "rename": "os.rename",
    "replace": "os.rename",
    "mkdir": "os.mkdir",
    "unlink": "os.remove",
    "remove": "os.remove",
    "rmdir": "os.rmdir",
    "truncate": "os.truncate",
    "ftruncate": "os.truncate",
    "link": "os.link",
    "symlink": "os.symlink",
    "chmod": "os.chmod",
    "write": None,
    "fsync": None,
    "fdatasync": None,
}


class Operation(NamedTuple):
    """One operation: what, on which path, how many bytes."""

    kind: str
    path: str
    bytes: int = 0


class Death(NamedTuple):
    """At which operation the process dies: ``before`` it, or when half of a write is done (``torn``).

    Every operation is numbered, so after one is before the next; the number past the last one is the end.
    """

    number: int
    moment: str


class FileOperations:
    """Records all operations of this process from ``install`` on, and dies at ``death``; for a forked child."""

    def __init__(self, death: Death | None = None) -> None:
        self.done: list[Operation] = []
        self._tried: Counter[str] = Counter()  # with those that raised, such as the mkdir of a folder that is there
        self._audited: Counter[str] = Counter()
        self._death = death

    def install(self) -> None:
        """Replace the functions, for the rest of the process's life."""
        original_open = io.open

        def watched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return original_open(file, mode, *args, **kwargs)
            if not isinstance(file, int):
                self._before("open")
            opened = original_open(file, mode, *args, **kwargs)
            if isinstance(file, int):  # a pipe's end, not a name
                return opened
            self._after(Operation("open", os.fspath(file)))
            return _WatchedFile(opened, os.fspath(file), self)

        builtins.open = io.open = watched_open
        for name in NAMES:
            setattr(os, name, self._watched(name, getattr(os, name)))
        sys.addaudithook(self._audit)

    def unnumbered(self) -> dict[str, tuple[int, int]]:
        """By kind of audited event: how many there were, and how many went by here; only where they differ."""
        kinds = {event for event in NAMES.values() if event is not None} | {"open"}
        return {
            kind: (self._audited[kind], self._tried[kind]) for kind in kinds if self._audited[kind] != self._tried[kind]
        }

    def write(self, file: Any, path: str, data: Any) -> Any:
        """One write to an open file."""
        self._before("write")
        if self._dies_at("torn"):
            file.write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            file.flush()
            self._die()
        written = file.write(data)
        self._after(Operation("write", path, memoryview(data).nbytes))
        return written

    def _watched(self, name: str, original: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._before(NAMES[name] or name)
            result = original(*args, **kwargs)
            subject = args[0]
            path = os.readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else os.fspath(subject)
            self._after(Operation(name, path))
            return result

        return watched

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            flags = args[2]
            if isinstance(flags, int) and flags & WRITE_FLAGS:
                self._audited["open"] += 1
        elif event in NAMES.values():
            self._audited[event] += 1

    def _dies_at(self, moment: str) -> bool:
        return self._death == (len(self.done), moment)

    def _before(self, event: str) -> None:
        self._tried[event] += 1
        if self._dies_at("before"):
            self._die()

    def _after(self, operation: Operation) -> None:
        self.done.append(operation)

    def _die(self) -> NoReturn:
        os._exit(DIED)


class _WatchedFile:
    """An open file whose writes are operations."""

    def __init__(self, file: Any, path: str, operations: FileOperations) -> None:
        self._file, self._path, self._operations = file, path, operations

    def write(self, data: Any) -> Any:
        return self._operations.write(self._file, self._path, data)

    def __enter__(self) -> _WatchedFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's content by its path below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
