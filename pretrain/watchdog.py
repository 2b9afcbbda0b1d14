"""Ends a run that hangs or has lost a rank, so that it can be started again: stacks first, then status 75.

Collectives wait for everybody: a rank that dies or hangs stops all others, silently, until the backend's time-out (30
minutes), or for ever. Two threads beside the training watch for that:

- **Heartbeats.** Each rank counts up a number in the rendezvous store, over a connection of its own. The first rank
  reads all numbers, the others read the first one's; a number that stands still for ``silence_seconds`` is a rank that
  died, was stopped, or holds the interpreter. When the process that hosts the store dies, the connection does, which
  says as much. A rank whose collective has failed says so, and then a few seconds of silence are enough.
- **Progress.** The trainer names what it is doing (:meth:`Watchdog.phase`). Each phase has a limit learnt from the
  run's own times: ``factor`` times their median, within [``floor_seconds``, ``ceiling_seconds``]; the ceiling alone for
  the first ones (compilation) and for what is rare. Import, start and loading are outside, or have the ceiling.

The first verdict in the store is everybody's. Each rank writes the stacks of all its threads to ``RUN/stacks/``, and
ends by ``os._exit``, since its main thread may never come back: with 75, or with the status of the rank that failed, so
that a mistake is not taken for a lost node. Cost: three small requests to the store a rank and heartbeat.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import sys
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from launch.environment import Place
from launch.settings import EXIT_PREEMPTED
from pretrain.config import WatchdogSection
from pretrain.fault_log import FaultLog
from pretrain.preemption import StopRequest

ENOUGH_TIMES = 5
REMEMBERED_TIMES = 64
NOTHING = "-"  # a store's value cannot be empty
LAST_WORDS_SECONDS = 3.0
STDERR = 2


def new_session() -> str:
    """A name for a start of the run: its second, and something random, from a generator that no seed moves."""
    return f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end now."""

    kind: str  # silent_rank, no_progress, or failed
    rank: int
    host: str
    why: str
    status: int

    def line(self) -> str:
        """For the console."""
        return f"rank {self.rank} on {self.host}: {self.why}"


class Phases:
    """How long each kind of work took, and how long it may take."""

    def __init__(self, section: WatchdogSection) -> None:
        self._section = section
        self._times: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED_TIMES))

    def add(self, name: str, seconds: float) -> None:
        """Learn."""
        self._times[name].append(seconds)

    def limit(self, name: str, at_least: float = 0.0) -> float:
        """Seconds that phase ``name`` may take."""
        times, section = list(self._times[name]), self._section
        learnt = section.ceiling_seconds
        if len(times) >= ENOUGH_TIMES:
            learnt = min(max(section.factor * median(times), section.floor_seconds), section.ceiling_seconds)
        return max(learnt, at_least)


class Watchdog:
    """Watches this rank's progress and the other ranks' lives from :meth:`start` to :meth:`leave`."""

    def __init__(
        self, section: WatchdogSection, place: Place, hosts: list[str], session: str, run_path: Path, faults: FaultLog
    ) -> None:
        """``hosts`` by rank, and ``session``, a name for this start of the run, are the same on every rank."""
        self.section, self.place, self.hosts, self.session = section, place, hosts, session
        self.folder = run_path / "stacks" / session
        self.faults = faults
        self.phases = Phases(section)
        self._now: tuple[str, float, float] | None = None  # phase, when it must be over, its limit
        self._answered = time.monotonic()  # when the store last answered
        self._alive = True
        self._suspicious = False
        self._failure = ""
        self._verdict: Verdict | None = None
        self._stop: StopRequest | None = None
        self._store: Any = None
        self._ended = threading.Lock()

    def start(self, store: Any, stop: StopRequest | None = None) -> None:
        """Begin. ``store`` is the process group's (:meth:`TrainingEngine.rendezvous_store`), None for a lone rank.

        Collective: the caller meets the other ranks at a barrier afterwards, before anyone can be missed.
        """
        self._stop = stop
        if not self.section.enabled:
            return
        self._store = store
        if store is not None:
            self._store.set_timeout(timedelta(seconds=self.section.silence_seconds))
            self._store.set(f"pulse/{self.place.rank}", "0")
            if self.place.is_first:
                for key in ("verdict", "stop", "suspicion"):
                    self._store.set(key, NOTHING)
            threading.Thread(target=self._exchange, name="heartbeat", daemon=True).start()
        threading.Thread(target=self._judge, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def phase(self, name: str, at_least: float = 0.0) -> Iterator[None]:
        """Work that must be over within the limit learnt for ``name``, which is never below ``at_least`` seconds."""
        started = time.monotonic()
        limit = self.phases.limit(name, at_least)
        self._now = (name, started + limit, limit)
        try:
            yield
        finally:
            self._now = None
        self.phases.add(name, time.monotonic() - started)

    def leave(self) -> None:
        """This rank ends as all others do; nobody shall miss it."""
        if not self._alive:
            return
        self._alive = False
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # torch's store errors: who is gone does not miss anybody
                self._store.set(f"pulse/{self.place.rank}", "left")

    def fail(self, status: int, why: str) -> None:
        """This rank ends with ``status`` and has said why; the others, who know nothing yet, end with it too."""
        if self._alive and self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._post(Verdict("failed", self.place.rank, self.hosts[self.place.rank], why, status))
        self.leave()
        if self.place.is_first and self._store is not None:
            # The store ends with this process; the others shall read the verdict first, not miss its host.
            time.sleep(3 * self.section.heartbeat_seconds)

    def blame(self) -> None:
        """A collective failed here: if another rank is gone, this process ends with 75 and the call does not return."""
        if not self._alive or self._store is None:
            return
        self._failure = traceback.format_exc()
        self._suspicious = True
        time.sleep(2 * self._short_silence() + 4 * self.section.heartbeat_seconds)
        while self._verdict is not None:
            time.sleep(1)  # the judge is about to end this process

    def _short_silence(self) -> float:
        return min(self.section.silence_seconds, max(4 * self.section.heartbeat_seconds, 4.0))

    # The heartbeat's thread: everything that talks to the store.

    def _exchange(self) -> None:
        beat = 0
        seen = {
            rank: ("", time.monotonic()) for rank in (range(self.place.world_size) if self.place.is_first else (0,))
        }
        pulses = [f"pulse/{rank}" for rank in seen]
        while self._alive:
            beat += 1
            try:
                self._store.set(f"pulse/{self.place.rank}", str(beat))
                if self._suspicious:
                    self._store.set("suspicion", str(self.place.rank))
                if self._stop is not None and self._stop.received is not None:
                    self._store.set("stop", str(self.place.rank))
                values = [value.decode() for value in self._store.multi_get(["verdict", "stop", "suspicion", *pulses])]
            except RuntimeError as error:  # what torch raises for a lost connection and for a time-out
                self._lose_store(error)
                return
            self._answered = time.monotonic()
            verdict, stop, suspicion, *counts = values
            if stop != NOTHING and self._stop is not None:
                self._stop.set()
            if verdict != NOTHING:
                self._verdict = Verdict(**json.loads(verdict))
                return
            self._look_for_silence(seen, dict(zip(seen, counts, strict=True)), suspicion != NOTHING)
            time.sleep(self.section.heartbeat_seconds)

    def _look_for_silence(self, seen: dict[int, tuple[str, float]], counts: dict[int, str], suspicion: bool) -> None:
        now = time.monotonic()
        limit = self._short_silence() if suspicion else self.section.silence_seconds
        for rank, count in counts.items():
            if count != seen[rank][0]:
                seen[rank] = (count, now)
            elif count != "left" and now - seen[rank][1] > limit:
                why = f"no sign of life for {now - seen[rank][1]:.0f} s; it died, was stopped, or its node is gone"
                self._post(Verdict("silent_rank", rank, self.hosts[rank], why, EXIT_PREEMPTED))
                return

    def _lose_store(self, error: RuntimeError) -> None:
        if self._alive:
            why = (
                f"the rendezvous store, which it hosts, is gone; it died, or its node is gone ({type(error).__name__})"
            )
            self._verdict = Verdict("silent_rank", 0, self.hosts[0], why, EXIT_PREEMPTED)

    def _post(self, verdict: Verdict) -> None:
        """The first verdict counts, for everybody."""
        self._store.compare_set("verdict", NOTHING, json.dumps(asdict(verdict)))

    # The judge's thread: decides, dumps, ends. It never waits for the store.

    def _judge(self) -> None:
        pause = self.section.heartbeat_seconds / 2
        # The first rank writes silence into the store itself: give its own verdict the time to come back.
        store_limit = self.section.silence_seconds + 4 * self.section.heartbeat_seconds
        while self._alive:
            # From a C thread, should some library never give the interpreter back: the stacks, and nothing else.
            faulthandler.dump_traceback_later(self.section.silence_seconds + 60, file=STDERR)
            time.sleep(pause)
            now = time.monotonic()
            phase = self._now
            if self._verdict is not None:
                self._end(self._verdict)
            elif self.place.world_size > 1 and now - self._answered > store_limit:
                why = f"the rendezvous store, which it hosts, has not answered for {now - self._answered:.0f} s"
                self._end(Verdict("silent_rank", 0, self.hosts[0], why, EXIT_PREEMPTED))
            elif phase is not None and now > phase[1]:
                self._report_no_progress(phase[0], phase[2])
        faulthandler.cancel_dump_traceback_later()

    def _report_no_progress(self, phase: str, limit: float) -> None:
        why = f"{phase} was not over after {limit:.0f} s"
        verdict = Verdict("no_progress", self.place.rank, self.hosts[self.place.rank], why, EXIT_PREEMPTED)
        if self.place.world_size == 1:
            self._end(verdict)
        # Through a thread that may hang with the store; meanwhile the heartbeat brings the verdict that counts.
        threading.Thread(target=self._post, args=(verdict,), daemon=True).start()
        deadline = time.monotonic() + 3 * self.section.heartbeat_seconds
        while self._verdict is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._end(self._verdict or verdict)

    def _end(self, verdict: Verdict) -> None:
        self._verdict = verdict
        with self._ended:
            faulthandler.cancel_dump_traceback_later()
            first_is_lost = verdict.kind == "silent_rank" and verdict.rank == 0
            announces = self.place.rank == (1 if first_is_lost else 0)
            if verdict.kind == "failed":  # its rank has said why
                os._exit(verdict.status)
            self._dump(verdict)
            where = self._gather_positions() if verdict.kind == "no_progress" else []
            if announces:
                lines = [f"error: {verdict.line()}; stacks of the ranks are in {self.folder}", *where]
                print("\n".join(lines), file=sys.stderr, flush=True)
                self.faults.add(
                    verdict.kind, of_rank=verdict.rank, of_host=verdict.host, why=verdict.why, positions=where
                )
            if self.place.is_first and self.place.world_size > 1:
                # The store ends with this process; the others shall read the verdict first, not miss its host.
                time.sleep(3 * self.section.heartbeat_seconds)
            sys.stdout.flush()
            os._exit(verdict.status)

    def _dump(self, verdict: Verdict) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{self.place.rank:05d}.txt").open("w") as file:
                file.write(f"{verdict.line()}\nthis is rank {self.place.rank} on {self.hosts[self.place.rank]}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                if self._failure:  # the stack above is no longer that of the collective
                    file.write(f"\nwhat the main thread was doing when its collective failed:\n{self._failure}")
        except OSError:  # a full or vanished run directory must not keep the process from ending
            faulthandler.dump_traceback(STDERR, all_threads=True)

    def _gather_positions(self) -> list[str]:
        """Where the ranks' main threads stand, the rarest place first: who hangs alone is the one to look at."""
        mine = main_thread_position()
        if self.place.world_size == 1:
            return [f"  rank 0: {mine}"]
        told = threading.Event()
        by_place: defaultdict[str, list[int]] = defaultdict(list)

        def exchange() -> None:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"position/{self.place.rank}", mine)
                if self.place.is_first:
                    self._store.set_timeout(timedelta(seconds=LAST_WORDS_SECONDS))
                    for rank in range(self.place.world_size):
                        position = self._store.get(f"position/{rank}").decode()
                        by_place[position].append(rank)
            told.set()

        threading.Thread(target=exchange, daemon=True).start()
        told.wait(2 * LAST_WORDS_SECONDS)
        places = sorted(by_place.items(), key=lambda item: len(item[1]))
        return [f"  rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}: {place}" for place, ranks in places]


def main_thread_position() -> str:
    """The innermost Python function of the main thread, and the innermost of this project, with file and line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = None
    root = str(Path(__file__).resolve().parent.parent)
    while frame is not None:
        code = frame.f_code
        place = f"{code.co_name} ({Path(code.co_filename).name}:{frame.f_lineno})"
        if innermost is None:
            innermost = place
        if code.co_filename.startswith(root) and "site-packages" not in code.co_filename:
            return innermost if place == innermost else f"{innermost}, called from {place}"
        frame = frame.f_back
    return innermost or "not in Python"


def _ranges(ranks: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], rank]
        else:
            parts.append([rank])
    return ",".join("-".join(map(str, part)) for part in parts)
