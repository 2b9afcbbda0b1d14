"""Pipelines small enough to watch: one step that writes a file a piece, and can be told to go wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datatrove.pipeline.base import PipelineStep

from launch.settings import BadInputError


def make_step(folder: Path, **trouble: Any) -> PipelineStep:
    """A step that writes ``folder/documents/PIECE.txt`` in two halves; ``trouble`` maps what to do to pieces.

    ``bad`` pieces raise ``BadInputError``, ``broken`` ones something else, ``killed`` ones kill their process, each
    between the halves. ``once`` is a folder: a trouble noted there does not happen again.
    """

    class WriteHalves(PipelineStep):
        name = "halves"
        type = "test"

        def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
            path = folder / "documents" / f"{rank:05d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"first half of {rank} of {world_size}\n")
                file.flush()
                self.fail(rank)
                file.write("second half\n")
            yield from ()

        def fail(self, rank: int) -> None:
            once = trouble.get("once")
            if once is not None:
                try:
                    (once / f"{rank}").touch(exist_ok=False)
                except FileExistsError:
                    return
            if rank in trouble.get("bad", ()):
                raise BadInputError(f"input {rank}: is bad")
            if rank in trouble.get("broken", ()):
                raise trouble.get("error", ZeroDivisionError("a bug\nin two lines"))
            if rank in trouble.get("killed", ()):
                os.kill(os.getpid(), signal.SIGKILL)

    return WriteHalves()


@pytest.fixture(scope="session")
def step_for() -> Callable[..., PipelineStep]:
    """Call ``step_for(folder, bad=[3])``."""
    return make_step


def contents(folder: Path) -> dict[str, str]:
    """Names and contents of the documents in an attempt's folder."""
    return {path.name: path.read_text() for path in sorted((folder / "documents").glob("*"))}


def whole(pieces: int) -> dict[str, str]:
    """What :func:`make_step` writes when nothing goes wrong."""
    return {f"{piece:05d}.txt": f"first half of {piece} of {pieces}\nsecond half\n" for piece in range(pieces)}


@pytest.fixture(scope="session")
def contents_of() -> Callable[[Path], dict[str, str]]:
    """Call ``contents_of(attempt)``."""
    return contents


@pytest.fixture(scope="session")
def whole_output() -> Callable[[int], dict[str, str]]:
    """Call ``whole_output(pieces)``."""
    return whole
