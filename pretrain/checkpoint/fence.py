"""One owner of a run directory: a start takes the next generation, and older ones can commit nothing.

A scheduler may start a run again while a process of the last start still lives: hung in a collective, cut off from the
controller, stopped by a debugger. When it wakes up it must change nothing. Each start writes ``generation.json``: the
next number, and a random token since two starts may happen at once and the later write must win. Whoever commits first
reads the file.

Reading and committing are two operations, and a process can sleep between them. So a start also takes the folders that
unfinished saves are written in away from their owners, by renaming them *after* it has written its generation: a commit
is one rename of such a folder, which then fails. A stale commit has therefore either happened before the new start
listed the checkpoints, or never happens.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from pathlib import Path
from typing import Any

from launch.files import fsync_path, write_json_atomically
from launch.settings import BadInputError
from pretrain.checkpoint.errors import StaleRunError
from pretrain.checkpoint.layout import DEAD, PARTIAL

GENERATION = "generation.json"


class Fence:
    """This process's claim on ``run_path``; used on the first rank."""

    def __init__(self, run_path: Path) -> None:
        self._path = run_path / GENERATION
        self._mine: dict[str, Any] | None = None

    @property
    def taken(self) -> bool:
        """Whether ``take`` was called."""
        return self._mine is not None

    @property
    def label(self) -> str:
        """A name that no other start of this run has."""
        if self._mine is None:
            raise RuntimeError("a fence has no label before it is taken")
        return f"g{self._mine['generation']}_{self._mine['token']}"

    def take(self, checkpoints: Path) -> int:
        """Claim the next generation, and take away what older ones are writing below ``checkpoints``; the number."""
        generation = self._newest().get("generation", 0) + 1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._mine = {
            "generation": generation,
            "token": secrets.token_hex(4),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        write_json_atomically(self._path, self._mine)
        if checkpoints.is_dir():
            for folder in checkpoints.glob(f"{PARTIAL}*"):
                folder.rename(folder.with_name(f"{DEAD}{folder.name}"))
            fsync_path(checkpoints)
        return int(generation)

    def check(self) -> None:
        """Raise ``StaleRunError`` unless this process's generation is still the newest."""
        newest = self._newest()
        if self._mine is None or newest != self._mine:
            mine = "none" if self._mine is None else self._mine["generation"]
            raise StaleRunError(
                f"{self._path}: generation {newest.get('generation')} was started by process {newest.get('process')} "
                f"on {newest.get('host')}; this process is generation {mine}, commits nothing more and stops"
            )

    def _newest(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text())
            if not isinstance(found, dict) or not isinstance(found["generation"], int):
                raise ValueError("no generation number in it")
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError) as error:
            raise BadInputError(
                f"{self._path}: not a generation record ({error}); make sure that no process of this run is alive, "
                "and remove the file"
            ) from None
        return found
