"""A lost or hanging rank ends all others in seconds, with stacks and a status that says what to do."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.config import WatchdogSection
from pretrain.watchdog import Phases

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]

Starter = Callable[..., list["subprocess.Popen[bytes]"]]


@pytest.fixture
def start(tmp_path: Path, repository_root: Path) -> Iterator[Starter]:
    """Start a toy run of two or more ranks with a fault; whatever is left of it ends with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_ranks(fault: str, culprit: int, ranks: int = 2) -> list[subprocess.Popen[bytes]]:
        port = random.SystemRandom().randrange(20000, 30000)
        worker = Path(__file__).parent / "watched_rank.py"
        for rank in range(ranks):
            arguments = [str(rank), str(ranks), str(port), str(tmp_path), fault, str(culprit)]
            with (tmp_path / f"rank_{rank}.log").open("wb") as log:
                environment = {**os.environ, "PYTHONPATH": str(repository_root)}
                started.append(
                    subprocess.Popen(
                        [sys.executable, str(worker), *arguments], stdout=log, stderr=log, cwd=tmp_path, env=environment
                    )
                )
        return started[-ranks:]

    yield start_ranks
    for process in started:
        process.kill()
        process.wait()


def faults_in(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("fault", "culprit"), [("killed", 0), ("killed", 1), ("stopped", 0), ("sleeps", 1)])
def test_the_other_ranks_end_resumably_and_leave_their_stacks(
    start: Starter, tmp_path: Path, fault: str, culprit: int
) -> None:
    ranks = start(fault, culprit)
    survivors = [rank for rank in range(2) if rank != culprit]
    for rank in survivors:
        assert ranks[rank].wait(120) == 75, (tmp_path / f"rank_{rank}.log").read_text()
        stacks = (tmp_path / "stacks" / "session" / f"rank_{rank:05d}.txt").read_text()
        # gloo tells of a dead peer at once: then the main thread waits for the watchdog's verdict.
        assert ("in blame" if fault == "killed" else "in all_reduce") in stacks
        assert "in main" in stacks
    (entry,) = faults_in(tmp_path)
    log = "".join((tmp_path / f"rank_{rank}.log").read_text() for rank in survivors)
    if fault == "sleeps":
        # It is alive and well, so it ends itself, and its stack says why.
        assert ranks[culprit].wait(60) == 75
        assert entry["kind"] == "no_progress"
        assert "in sleeps_in_python" in (tmp_path / "stacks" / "session" / f"rank_{culprit:05d}.txt").read_text()
        positions = entry["positions"]
        assert isinstance(positions, list)
        assert any(f"rank {culprit}: sleeps_in_python" in position for position in positions), positions
    else:
        assert (entry["kind"], entry["of_rank"], entry["of_host"]) == ("silent_rank", culprit, f"node{culprit}")
        assert f"rank {culprit} on node{culprit}" in log


def test_a_rank_that_fails_by_itself_gives_its_status_to_the_others(start: Starter, tmp_path: Path) -> None:
    ranks = start("raises", 1)
    assert [rank.wait(120) for rank in ranks] == [1, 1]
    assert not (tmp_path / "stacks").exists()


def test_a_signal_to_one_rank_is_heard_by_all_and_a_first_evaluation_may_take_longer_than_steps(
    start: Starter, tmp_path: Path
) -> None:
    ranks = start("none", 0)
    while "step 10" not in (tmp_path / "rank_1.log").read_text():
        assert ranks[1].poll() is None
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGUSR1)
    assert [rank.wait(120) for rank in ranks] == [0, 0], (tmp_path / "rank_0.log").read_text()


def test_limits_follow_the_median_between_floor_and_ceiling() -> None:
    section = WatchdogSection(silence_seconds=5, factor=10, floor_seconds=20, ceiling_seconds=100)
    phases = Phases(section)
    assert phases.limit("step") == 100
    for seconds in (50.0, 1.0, 3.0, 4.0):
        phases.add("step", seconds)
    assert phases.limit("step") == 100, "too few to know"
    phases.add("step", 5.0)
    assert phases.limit("step") == 40
    assert phases.limit("step", at_least=70) == 70
    assert phases.limit("evaluation") == 100
    for _ in range(64):
        phases.add("step", 0.1)
    assert phases.limit("step") == 20
    for _ in range(64):
        phases.add("step", 60.0)
    assert phases.limit("step") == 100
