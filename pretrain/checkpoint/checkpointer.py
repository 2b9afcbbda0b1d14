"""Saving and resuming one run directory, on all ranks together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load_file

from launch.files import fsync_path, write_atomically
from launch.settings import BadInputError
from pretrain.checkpoint.background import BackgroundWork
from pretrain.checkpoint.commit import clean_up, commit
from pretrain.checkpoint.errors import CheckpointError, SaveFailedError, StaleRunError
from pretrain.checkpoint.fence import Fence
from pretrain.checkpoint.layout import (
    BIASES,
    ENGINE,
    LATEST,
    PARTIAL,
    STATE,
    WEIGHTS,
    committed,
    rank_file,
    step_folder_name,
    step_of,
)
from pretrain.checkpoint.manifest import find_damage
from pretrain.checkpoint.random_state import random_state, restore_random_state
from pretrain.checkpoint.retention import remove
from pretrain.checkpoint.share import CONTENT, shares_done, write_share
from pretrain.checkpoint.snapshot import HostBuffers
from pretrain.checkpoint.state import (
    ELASTIC,
    RunIdentity,
    TrainingState,
    decode_state,
    encode_state,
    is_reshaped,
    read_record,
    require_same_identity,
)
from pretrain.checkpoint.universal import find_universal, make_universal, universal_folder
from pretrain.checkpoint.unpickling import find_unsafe, load_data
from pretrain.config import CheckpointSection
from pretrain.weights import WritesFile, safetensors_file, weight_files

if TYPE_CHECKING:
    from pretrain.engine import TrainingEngine

Result = TypeVar("Result")

LONG_WAIT_SECONDS = 1.0
POLL_SECONDS = (0.005, 0.25)  # between two looks at something that is awaited: at first, and at most


@dataclass(frozen=True)
class _PendingSave:
    """A save whose outcome the ranks have not agreed on yet."""

    step: int
    work: BackgroundWork


class Checkpointer:
    """Saves, prunes and finds the checkpoints of one run directory. All methods are collective.

    ``save`` copies the state and returns; ``poll``, called once a step, reports what became of the write; ``wait``
    returns when that is known. A write that fails is told and costs nothing but that checkpoint, until
    ``checkpoint.max_failed_saves`` have failed in a row.
    """

    def __init__(
        self,
        folder: Path,
        section: CheckpointSection,
        identity: RunIdentity,
        engine: TrainingEngine,
        fence: Fence,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.section, self.identity, self.engine, self.say = folder, section, identity, engine, say
        self._fence, self._label, self._saves = fence, "", 0
        self._buffers = HostBuffers()
        self._pending: _PendingSave | None = None
        self._work: BackgroundWork | None = None
        self._proven: list[Path] = []
        self._failures = 0
        self._last_succeeded = True
        self._listed: list[str] = []
        self._notices: deque[str] = deque()  # of the writer's thread, for the next poll

    # Saving

    def save(self, state: TrainingState) -> None:
        """Copy everything a resume needs, and have it written and committed behind the training loop.

        Waits for the save before this one, and says how long when that is noticeable. Raises what ``poll`` raises.
        """
        started = time.monotonic()
        self.wait()
        if not self._writers_idle():
            self._count_failure(state.step, "the write before it still hangs in the storage")
            return
        waited = time.monotonic() - started
        if waited > LONG_WAIT_SECONDS:
            self.say(f"checkpoint of step {state.step}: waited {waited:.1f} s for the write of the one before")
        self._saves += 1
        target = self.folder / f"{PARTIAL}{step_folder_name(state.step)}_{self._label}_{self._saves}"
        files = self._snapshot(target / CONTENT, state)
        work = BackgroundWork(partial(self._write, target, state.step, files))
        self._pending = _PendingSave(state.step, work)
        self._work = work
        if not self.section.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Report the outcome of the save that is being written, if it has one; no collective when none is.

        Raises ``StaleRunError`` when another start has taken over the run directory, and ``SaveFailedError`` when too
        many saves have failed in a row; on all ranks alike.
        """
        pending = self._pending
        if pending is None:
            return
        while self._notices:
            self.say(self._notices.popleft())
        work = pending.work
        running_here = work.running  # before its error is looked at: it may end in between
        error = self._failure(work, running_here)
        running, failed = self.engine.sum_over_ranks([float(running_here), float(error is not None)])
        if failed:
            self._pending = None
            work.give_up()
            self._require_fence()
            problems = [each for each in self.engine.gather_objects(error) if each is not None]
            self._count_failure(pending.step, problems[0])
        elif not running:
            self._pending = None
            self._failures, self._last_succeeded = 0, True

    def wait(self) -> bool:
        """Return when the last save is committed or has failed; whether it is committed. Raises what ``poll`` does."""
        pause, longest = POLL_SECONDS
        while self._pending is not None:
            self.poll()
            if self._pending is not None:
                time.sleep(pause)
                pause = min(2 * pause, longest)
        return self._last_succeeded

    def _failure(self, work: BackgroundWork, running: bool) -> str | None:
        """What this rank has to say about a write that failed; None when it has not, so far."""
        here = f"rank {self.engine.place.rank}"
        if running and work.seconds >= self.section.write_timeout_seconds:
            return f"{here}: not written in {work.seconds:.0f} s (checkpoint.write_timeout_seconds)"
        if running or work.error is None:
            return None
        return f"{here}: {type(work.error).__name__}: {work.error}"

    def _require_fence(self) -> None:
        """Raise ``StaleRunError`` on all ranks when another start has taken over, which also makes a write fail."""
        stale = None
        if self.engine.place.is_first:
            try:
                self._fence.check()
            except StaleRunError as error:
                stale = str(error)
            except (OSError, BadInputError) as error:  # the storage fails, which is no sign of another start
                self._notices.append(f"who owns the run directory cannot be read: {error}")
        stale = self.engine.gather_objects(stale)[0]
        if stale is not None:
            raise StaleRunError(stale)

    def _count_failure(self, step: int, problem: str) -> None:
        self._failures += 1
        self._last_succeeded = False
        limit = self.section.max_failed_saves
        kept = "the checkpoints before it are untouched"
        if self._failures >= limit:
            raise SaveFailedError(
                f"checkpoint of step {step} could not be written: {problem}; {kept}, but {self._failures} saves in a "
                f"row have failed (checkpoint.max_failed_saves): mend the storage of {self.folder} and start again"
            )
        self.say(
            f"checkpoint of step {step} could not be written: {problem}; {kept}; the next save tries again "
            f"(failure {self._failures} of {limit} in a row)"
        )

    def _writers_idle(self) -> bool:
        """Whether no rank's given-up write is still at work; gives it a moment to notice."""
        pause, longest = POLL_SECONDS
        deadline = time.monotonic() + LONG_WAIT_SECONDS
        while True:
            running = self._work is not None and self._work.running
            late = time.monotonic() > deadline
            busy, ranks_late = self.engine.sum_over_ranks([float(running), float(late)])
            if not busy or ranks_late:
                return not busy
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _snapshot(self, content: Path, state: TrainingState) -> dict[str, WritesFile]:
        """This rank's files, as functions that write them from host memory."""
        engine, buffers = self.engine, self._buffers
        buffers.begin()
        # Where training waits for the write, live tensors do, and the host memory is saved.
        copy = buffers.copy if self.section.asynchronous else None
        objects: dict[str, Any] = engine.snapshot(content, ENGINE, copy)
        objects[rank_file(engine.place.rank)] = random_state()
        files: dict[str, WritesFile] = {name: partial(_write_object, value) for name, value in objects.items()}
        if engine.place.is_first:
            files[BIASES] = safetensors_file(buffers.copy(engine.selection_biases()))
            encoded = encode_state(state, self.identity)
            files[STATE] = lambda file: file.write(encoded)
        if self.section.plain_weights:
            plain = weight_files(engine.model_config, engine.plain_weights(), engine.place.is_first)
            files.update({f"{WEIGHTS}/{name}": write for name, write in plain.items()})
        buffers.finish()
        return files

    def _write(self, target: Path, step: int, files: dict[str, WritesFile], go_on: Callable[[], None]) -> None:
        """This rank's part of a save, on the writer's thread; the first rank commits when all have done theirs."""
        place, section = self.engine.place, self.section
        if place.is_first:
            self._fence.check()
        write_share(target, place.rank, files, go_on, section.verify_writes)
        if not place.is_first:
            return
        pause, longest = POLL_SECONDS
        while (entries := shares_done(target, place.world_size)) is None:
            go_on()
            time.sleep(pause)
            pause = min(2 * pause, longest)
        go_on()
        checkpoint = commit(target, step, entries, self._fence)
        if section.verify_writes:
            self._proven = [checkpoint]
        clean_up(self.folder, section, [checkpoint, *self._proven], self._fence, self._notices.append)

    # Resuming

    def resume(self, newest_step: int | None = None) -> TrainingState | None:
        """Load the newest valid checkpoint into the engine; None when the run directory has none.

        With ``newest_step`` (a rollback) the newest one at or before that step; later ones are removed once it is
        loaded, since a run that is started again must not continue from what was rolled back.

        Raises ``BadInputError`` when checkpoints exist but none is valid, when the newest valid one belongs to another
        model, other data or another topology, or when it holds more than data. The first call also takes the run
        directory over from any earlier start; a start that is refused does not. Raises ``StaleRunError`` when another
        start took it over meanwhile.
        """
        self.wait()
        found = self._newest_valid(newest_step)
        while not self._take_over():
            found = self._newest_valid(newest_step)  # an earlier start has committed in the meantime
        if found is None:
            return None
        state = self._load(found)
        self._proven = [found]
        if newest_step is not None:
            self._on_first(partial(self._remove_later, found))
        self._require_fence()  # loading takes minutes
        return state

    def _take_over(self) -> bool:
        """Take the fence, if that was not done; false when the list of checkpoints is no longer what was looked at."""
        if self._label:
            return True

        def take() -> tuple[str, bool]:
            self._fence.take(self.folder)
            return self._fence.label, self._list() == self._listed

        self._label, unchanged = self._on_first(take)
        return unchanged

    def _list(self) -> list[str]:
        return [path.name for path in reversed(committed(self.folder))]

    def _on_first(self, action: Callable[[], Result]) -> Result:
        """What ``action`` returns on the first rank, or raises there, on every rank.

        Only the first rank looks at the folder: a network file system may show the others an older one.
        """
        outcome: tuple[Result | None, Exception | None] = (None, None)
        if self.engine.place.is_first:
            try:
                outcome = (action(), None)
            except OSError as error:
                outcome = (None, BadInputError(f"{self.folder}: {error}"))
            except (CheckpointError, BadInputError) as error:
                outcome = (None, error)
        result, problem = self.engine.gather_objects(outcome)[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[no-any-return]

    def _load(self, found: Path) -> TrainingState:
        engine = self.engine
        record = read_record(found)
        reshaped = is_reshaped(record, self.identity)
        if reshaped:
            engine.load_universal(self._universal(found, record), ENGINE)
        else:
            engine.load(found, ENGINE)
        biases = engine.selection_biases()
        for name, bias in load_file(found / BIASES).items():
            biases[name].copy_(bias)
        # All ranks start with the same generators and draw alike, so one rank's stand for any.
        restore_random_state(load_data(found / rank_file(0 if reshaped else engine.place.rank)))
        engine.barrier()
        return decode_state(record)

    def _universal(self, found: Path, record: dict[str, Any]) -> Path:
        """The universal form of ``found``, checked; made by the first rank while the others wait, unless it exists."""
        saved, now = record["identity"]["topology"], self.identity.topology
        change = ", ".join(
            f"{key} {saved.get(key)} to {now.get(key)}" for key in ELASTIC if saved.get(key) != now.get(key)
        )
        folder = self._on_first(partial(find_universal, found))
        if folder is not None:
            damage = self._find_problem(folder)
            if damage is None:
                self.say(f"checkpoint {found.name}: {change}; loaded from {folder.name}")
                return folder
            self.say(f"{folder.name} is damaged and made anew: {damage}")
        started = time.monotonic()
        work = BackgroundWork(lambda _: make_universal(found)) if self.engine.place.is_first else None
        pause, longest = POLL_SECONDS
        while self.engine.sum_over_ranks([float(work is not None and work.running)])[0]:
            time.sleep(pause)
            pause = min(2 * pause, longest)

        def made() -> Path:
            assert work is not None
            if work.error is not None:
                raise work.error
            return universal_folder(found)

        folder = self._on_first(made)
        damage = self._find_problem(folder)
        if damage is not None:
            raise BadInputError(f"{folder}: {damage} just after it was made; look at the storage of {self.folder}")
        self.say(f"checkpoint {found.name}: {change}; converted in {time.monotonic() - started:.1f} s")
        return folder

    def _find_problem(self, checkpoint: Path) -> str | None:
        """What is wrong with the files of ``checkpoint``, on all ranks the same; each looks at its share."""
        place = self.engine.place
        damage = self._first_problem(find_damage(checkpoint, place.rank, place.world_size))
        return damage or self._first_problem(find_unsafe(checkpoint, place.rank, place.world_size))

    def _newest_valid(self, newest_step: int | None) -> Path | None:
        """The newest intact checkpoint of this run, on all ranks the same; says what it passes over."""
        place = self.engine.place
        self._listed = self._on_first(self._list)
        names = [name for name in self._listed if newest_step is None or step_of(Path(name)) <= newest_step]
        for name in names:
            found = self.folder / name
            damage = self._first_problem(find_damage(found, place.rank, place.world_size))
            if damage is not None:
                self.say(f"checkpoint {name} is damaged and not used: {damage}")
                continue
            require_same_identity(found, read_record(found), self.identity, self.section.allow_changed)
            unsafe = self._first_problem(find_unsafe(found, place.rank, place.world_size))
            if unsafe is not None:
                raise BadInputError(
                    f"{found}: {unsafe}, which could run code when it is loaded; this program never writes that: "
                    "nothing was loaded; find out who changed it, and restore the checkpoint from a copy"
                )
            return found
        if names:
            raise BadInputError(
                f"{self.folder}: none of {len(names)} checkpoint(s) is intact; restore one from a copy, or start over "
                "in another run.name"
            )
        return None

    def _first_problem(self, mine: str | None) -> str | None:
        return next((problem for problem in self.engine.gather_objects(mine) if problem is not None), None)

    def _remove_later(self, found: Path) -> None:
        for checkpoint in committed(self.folder):
            if step_of(checkpoint) > step_of(found):
                self._fence.check()
                remove(checkpoint)
        write_atomically(self.folder / LATEST, f"{found.name}\n".encode())
        fsync_path(self.folder)


def _write_object(value: Any, file: Any) -> None:
    # The zip container's CRC is computed while Python's lock is held, for seconds where a tensor has gigabytes; the
    # manifest's SHA-256 says more.
    torch.serialization.set_crc32_options(False)
    torch.save(value, file)
