"""Pieces: the unit of work and of completion.

A pipeline runs on pieces 0, 1, ... n - 1, each time with ``rank = piece`` and ``world_size = n``, by whichever worker
is free. A finished piece has a record ``LOGS/pieces/00012.json``, written when its files are whole and on the disk; the
record lists them. So a stage that was cut off goes on with the pieces that are missing, on any number of workers.

**Attempts.** Workers of a killed run may go on writing for a while, on another machine for a long while. So every
attempt at a stage works in a folder of its own, ``NAME-KEY.RANDOM.partial`` (stages.py). It takes over the finished
pieces of earlier attempts by renaming their files, and leaves what was half done where it is. A worker of an earlier
attempt then writes where nobody looks any more. Within one attempt a piece is given out once: no two processes ever
write one file.

datatrove's own completion markers are not used: they say nothing about the files, and are believed whatever the number
of tasks. datatrove runs each piece (logs, statistics, one step feeding the next).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import dill  # type: ignore[import-untyped]
from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from data_pipeline.disk_full import is_disk_full, unwritable
from data_pipeline.execution.written_files import written_files
from launch.files import fsync_path, path_inside, write_json_atomically
from launch.settings import BadInputError

PARTIAL_SUFFIX = ".partial"
# File names carry the piece with five digits, and are sorted as text.
MAX_PIECES = 100_000
RECORDS = "pieces"


class PieceFailedError(RuntimeError):
    """A piece failed through no fault of the input's; the message is one line. Exit status 1."""


class WorkersLostError(PieceFailedError):
    """Workers vanished with their pieces; another attempt at the stage goes on from what is finished.

    ``finished`` counts the pieces that this attempt got done.
    """

    def __init__(self, message: str, finished: int) -> None:
        super().__init__(message)
        self.finished = finished


@dataclass(frozen=True)
class Failure:
    """Why a piece failed; ``bad_input`` when the user can mend it."""

    piece: int
    message: str
    bad_input: bool


def raise_first(failures: Iterable[Failure]) -> NoReturn:
    """Raise the failure with the lowest piece number, and say how many more there were."""
    first, *more = sorted(failures, key=lambda failure: failure.piece)
    suffix = f" (and {len(more)} more piece{'s' if len(more) > 1 else ''} failed)" if more else ""
    kind = BadInputError if first.bad_input else PieceFailedError
    raise kind(first.message + suffix)


@dataclass(frozen=True)
class Work:
    """A pipeline and how many pieces it runs on; pickled, in memory, since each piece needs a fresh one."""

    pipeline: bytes
    pieces: int
    logs: Path

    @classmethod
    def of(cls, pipeline: Sequence[PipelineStep], pieces: int, logs: Path) -> Work:
        """``pipeline`` on ``pieces`` pieces; ``BadInputError`` when there are too many."""
        if pieces > MAX_PIECES:
            raise BadInputError(f"{pieces} pieces of work: at most {MAX_PIECES} can be told apart; make pieces larger")
        return cls(dill.dumps(list(pipeline)), pieces, logs)

    @property
    def attempt(self) -> Path | None:
        """The folder of this attempt at a stage; None when the pipeline runs outside of stages."""
        return next((path for path in self.logs.parents if path.name.endswith(PARTIAL_SUFFIX)), None)

    def describe(self, piece: int) -> str:
        """What people call a piece, such as ``minhash 1_signatures, piece 3 of 7``; counted from 0, like the files."""
        attempt = self.attempt
        if attempt is None:
            return f"piece {piece} of {self.pieces}"
        step = "/".join(self.logs.relative_to(attempt).parts[1:])
        stage = attempt.name.split("-")[0]
        return f"{stage}{' ' if step else ''}{step}, piece {piece} of {self.pieces}"

    def log_of(self, piece: int) -> Path:
        """The log that datatrove writes of a piece, tracebacks included."""
        return self.logs / "logs" / f"task_{piece:05d}.log"

    def start(self) -> list[int]:
        """Take over what earlier attempts finished; returns the pieces that are missing."""
        attempt = self.attempt
        if attempt is None:
            return list(range(self.pieces))
        if (self.logs / RECORDS).exists():
            raise RuntimeError(f"{self.logs}: a stage must give each of its pipelines another folder for logs")
        stage = attempt.name.removesuffix(PARTIAL_SUFFIX).rpartition(".")[0]
        earlier = sorted(path for path in attempt.parent.glob(f"{stage}.*{PARTIAL_SUFFIX}") if path != attempt)
        (self.logs / RECORDS).mkdir(parents=True)
        return [piece for piece in range(self.pieces) if not any(self._take_over(piece, path) for path in earlier)]

    def _record(self, attempt: Path, piece: int) -> Path:
        assert self.attempt is not None
        return attempt / self.logs.relative_to(self.attempt) / RECORDS / f"{piece:05d}.json"

    def _take_over(self, piece: int, earlier: Path) -> bool:
        """Move a piece's files here from ``earlier`` if all are there; killed half-way, it counts in neither place."""
        assert self.attempt is not None
        try:
            record = json.loads(self._record(earlier, piece).read_text())
            files = {path_inside(earlier, name): (name, size) for name, size in record["files"].items()}
            if record["pieces"] != self.pieces or any(path.stat().st_size != files[path][1] for path in files):
                return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        for path, (name, _) in files.items():
            target = self.attempt / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        write_json_atomically(self._record(self.attempt, piece), record)
        self._record(earlier, piece).unlink(missing_ok=True)
        return True

    def run_piece(self, piece: int) -> None:
        """Do one piece, and record it when it runs in a stage. Raises what the pipeline raises."""
        attempt = self.attempt
        if attempt is None:
            _PieceExecutor(dill.loads(self.pipeline), piece, self).run()
            return
        written: set[str] = set()
        try:
            with written_files(attempt) as written:
                _PieceExecutor(dill.loads(self.pipeline), piece, self).run()
            files = {}
            for name in sorted(written):
                fsync_path(attempt / name)
                files[name] = (attempt / name).stat().st_size
            write_json_atomically(self._record(attempt, piece), {"pieces": self.pieces, "files": files})
        except Exception:
            # Nobody takes over what is half done, and the next attempt may need the room. Logs say what happened.
            for name in written:
                if not (attempt / name).is_relative_to(self.logs):
                    (attempt / name).unlink(missing_ok=True)
            raise

    def try_piece(self, piece: int) -> Failure | None:
        """Do one piece; its failure is returned, to be raised where all failures are known."""
        try:
            self.run_piece(piece)
        except BadInputError as error:
            return Failure(piece, str(error), bad_input=True)
        except Exception as error:
            message = f"{self.describe(piece)}: {self._explain(error, piece)}"
            return Failure(piece, message, bad_input=is_disk_full(error))
        return None

    def _explain(self, error: Exception, piece: int) -> str:
        if is_disk_full(error):
            assert isinstance(error, OSError)
            return str(unwritable(self.attempt or self.logs, error))
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}; traceback in {self.log_of(piece)}"

    def files_before(self) -> set[str]:
        """The files in the attempt's folder before the pieces run, for :meth:`check_complete`."""
        return self._other_files() if self.attempt else set()

    def check_complete(self, before: set[str]) -> None:
        """Every new file is in the record of the one piece that wrote it, so a stage that goes on lacks nothing."""
        if self.attempt is None:
            return
        owner: dict[str, int] = {}
        for piece in range(self.pieces):
            for name in json.loads(self._record(self.attempt, piece).read_text())["files"]:
                if owner.setdefault(name, piece) != piece:
                    raise RuntimeError(f"{self.attempt}: pieces {owner[name]} and {piece} both wrote {name}")
        unknown = sorted(self._other_files() - before - owner.keys())
        if unknown:
            raise RuntimeError(
                f"{self.attempt}: {unknown[0]} was written behind the back of Python (and {len(unknown) - 1} more), "
                "so a run that is cut off could not go on from it; let the step write to a file that it opened"
            )

    def _other_files(self) -> set[str]:
        """All files but those in ``logs``, relative to the attempt's folder."""
        assert self.attempt is not None
        root = str(self.attempt)
        found = set()
        for folder, subfolders, names in os.walk(root):
            if folder == root and "logs" in subfolders:
                subfolders.remove("logs")
            relative = os.path.relpath(folder, root)
            found |= {os.path.normpath(os.path.join(relative, name)) for name in names}
        return found


class _PieceExecutor(PipelineExecutor):
    """datatrove's way of running one rank, without its chatter on the terminal and its completion markers."""

    def __init__(self, pipeline: list[PipelineStep], piece: int, work: Work) -> None:
        super().__init__(pipeline, str(work.logs), skip_completed=False)
        self.piece = piece
        self.pieces = work.pieces

    def run(self) -> None:
        """Run the piece; its log, and a traceback if it fails, are in ``LOGS/logs``."""
        logger.remove()
        with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink):
            try:
                self._run_for_rank(self.piece)
            finally:
                logger.remove()  # its sink is the redirected stream, closed from here on

    def mark_rank_as_completed(self, rank: int) -> None:
        """Our records say what is complete."""

    @property
    def world_size(self) -> int:
        """The number of pieces."""
        return self.pieces

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        """What datatrove's inference steps ask for: each piece is alone on one node."""
        values: dict[str, Any] = dict.fromkeys(DistributedEnvVars.__annotations__, "-1")
        return DistributedEnvVars(**{**values, "datatrove_node_ips": "localhost", "datatrove_executor": "LOCAL"})
