"""Stages: what is finished is skipped, what changed is done again, what was cut off goes on.

A stage is keyed by a hash of its settings and of the *content* of its inputs (the digest of each earlier stage, or the
hashes of source files). Each attempt at it works in a folder of its own, ``STAGES/NAME-KEY.RANDOM.partial``, which
takes over what earlier attempts finished (pieces.py) and is renamed to ``STAGES/NAME-KEY`` after its completion record
``DONE.json`` is written; so a folder without ``.partial`` is whole, and workers that outlive a killed run write where
nobody looks. A record lists the files with their sizes and times, and a stage whose files are gone or were changed is
done again: unlike datatrove's own completion markers, nothing is believed because a marker exists.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.execution.pieces import PARTIAL_SUFFIX, WorkersLostError
from data_pipeline.execution.progress import Reporter
from data_pipeline.execution.tally import Tally, read_tallies, tally_sum
from launch.files import fsync_path, sha256_of, write_json_atomically
from launch.settings import BadInputError

# Raise it when the code of a stage changes what it writes, so that results of older code are not taken for new ones.
PIPELINE_VERSION = 4
RECORD_NAME = "DONE.json"
SCRATCH_NAMES = ("scratch", "logs")
SIDE_NAMES = ("tallies", "dropped", "samples")
# Attempts in a row in which workers were lost and no piece was finished, before a stage is given up.
FRUITLESS_ATTEMPTS = 3


@dataclass(frozen=True)
class Stage:
    """What a stage is: its settings, what it depends on, and how it fills an empty folder.

    ``known_hashes`` gives the SHA-256 of output files that were hashed while they were written, by their names in the
    folder: terabytes of shards need not be read again for the stage's digest.
    """

    name: str
    settings: Any
    inputs: Mapping[str, str]
    build: Callable[[Path], None]
    watch: Sequence[str] = ()
    input_bytes: int | None = None
    known_hashes: Callable[[Path], Mapping[str, str]] | None = None

    @property
    def key(self) -> str:
        """Changes with the settings, the inputs' content, this program and the libraries that do the work."""
        libraries = {name: importlib.metadata.version(name) for name in ("datatrove", "sentencepiece")}
        return digest_of([PIPELINE_VERSION, libraries, self.name, self.settings, dict(self.inputs)])


@dataclass(frozen=True)
class Finished:
    """A finished stage: its folder, the digest of its output files, and whether it was there already."""

    folder: Path
    digest: str
    skipped: bool

    def tally(self, name: str) -> Tally:
        """A tally that the stage's pipelines kept."""
        return read_tallies(self.folder / "tallies" / name)


def digest_of(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class StageRunner:
    """Runs stages one after the other in one folder; :meth:`prune` then removes results that nothing refers to."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self.folder = folder
        self.reporter = reporter
        self._used: set[Path] = set()
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; another one that wants it ends in ``BadInputError``."""
        with (self.folder / "lock").open("w") as file:
            try:
                # A record lock is this process's alone. flock() would pass to forked workers, which may outlive a kill.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BadInputError(
                    f"{self.folder}: another preparation is running there; wait for it or choose another output"
                ) from None
            yield

    def run(self, stage: Stage) -> Finished:
        """The finished ``stage``, done now unless it was before."""
        folder = self.folder / f"{stage.name}-{stage.key[:16]}"
        self._used.add(folder)
        record = _valid_record(folder, stage.key)
        if record is not None:
            self.reporter.line(stage.name, "already done")
            return Finished(folder, record["digest"], skipped=True)
        shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        partial = self._build(stage, folder)
        digest = _write_record(partial, stage.key, stage.known_hashes(partial) if stage.known_hashes else {})
        os.replace(partial, folder)
        fsync_path(self.folder)
        for path in self.folder.glob(f"{glob.escape(folder.name)}.*{PARTIAL_SUFFIX}"):
            _remove(path)
        finished = Finished(folder, digest, skipped=False)
        self.reporter.line(stage.name, _summary(finished, stage, time.monotonic() - start))
        return finished

    def _build(self, stage: Stage, folder: Path) -> Path:
        """Attempt the stage, again while workers get lost but pieces get done; returns the attempt's folder."""
        fruitless = 0
        while True:
            partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")
            partial.mkdir()
            tallies = [partial / "tallies" / name for name in stage.watch]
            try:
                with self.reporter.watch(stage.name, tallies, stage.input_bytes):
                    stage.build(partial)
                return partial
            except WorkersLostError as lost:
                fruitless = 0 if lost.finished else fruitless + 1
                if fruitless == FRUITLESS_ATTEMPTS:
                    raise
                self.reporter.line(stage.name, f"goes on after this: {lost}")

    def prune(self) -> None:
        """Remove results of earlier settings, and leftovers of runs that were cut off."""
        for path in self.folder.iterdir():
            if path.is_dir() and path not in self._used:
                _remove(path)


def _remove(folder: Path) -> None:
    """Remove as much as can be: a worker of a killed run may still be writing there, and later runs remove the rest."""
    shutil.rmtree(folder, ignore_errors=True)


def _summary(finished: Finished, stage: Stage, seconds: float) -> str:
    tally = finished.tally(stage.watch[-1]) if stage.watch else {}
    counts = tally_sum(tally)
    if not counts["documents"]:
        return f"done in {seconds:.1f} s"
    size = counts["bytes"] / 1e6
    return f"{counts['documents']:,} documents, {size:.2f} MB, in {seconds:.1f} s ({size / seconds:.2f} MB/s)"


def _files(folder: Path, skip: Sequence[str]) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in skip
    )


def _write_record(folder: Path, key: str, known_hashes: Mapping[str, str]) -> str:
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    outputs = _files(folder, (*SCRATCH_NAMES, *SIDE_NAMES))
    names = {str(path.relative_to(folder)): path for path in outputs}
    digest = digest_of({name: known_hashes.get(name) or sha256_of(path) for name, path in names.items()})
    states = {}
    for path in _files(folder, SCRATCH_NAMES):
        fsync_path(path)
        states[str(path.relative_to(folder))] = _state(path)
    write_json_atomically(folder / RECORD_NAME, {"key": key, "digest": digest, "files": states})
    return digest


def _state(path: Path) -> list[int]:
    """Size and time of the last change, in whole seconds, since some file systems have no finer ones.

    A published shard is a link to a stage's file: who edits one changes the other, and it is the time that shows it.
    """
    status = path.stat()
    return [status.st_size, int(status.st_mtime)]


def _valid_record(folder: Path, key: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_NAME).read_text())
        whole = all(_state(folder / name) == state for name, state in record["files"].items())
        return record if whole and record["key"] == key else None
    except (OSError, ValueError, KeyError):
        return None
