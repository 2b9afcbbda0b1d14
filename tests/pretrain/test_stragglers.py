"""A rank that is slow again and again is named, once, by host."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.config import StragglerSection
from pretrain.fault_log import FaultLog
from pretrain.stragglers import StragglerCheck, slow_ranks, time_products

HOSTS = ["a", "b", "c", "d"]


def check_with(folder: Path, seconds: list[list[float]]) -> tuple[StragglerCheck, list[str]]:
    """A check on the first of four ranks, whose gatherings give ``seconds`` one after the other."""
    said: list[str] = []
    gatherings = iter(seconds)
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"), place=SimpleNamespace(is_first=True), gather_objects=lambda mine: next(gatherings)
    )
    section = StragglerSection(every=10, factor=1.5, times=3)
    return StragglerCheck(section, engine, HOSTS, FaultLog(folder, 0), said.append, lambda device: 1.0), said


def test_slow_is_relative_to_the_median() -> None:
    assert slow_ranks([1.0, 1.4, 1.6, 1.0], 1.5) == []  # the median is 1.2
    assert slow_ranks([1.0, 1.0, 1.6, 1.0], 1.5) == [2]


def test_only_a_rank_that_stays_slow_is_named_and_only_once(tmp_path: Path) -> None:
    fine, slow_b, slow_c = [1.0] * 4, [1.0, 3.0, 1.0, 1.0], [1.0, 1.0, 2.0, 1.0]
    check, said = check_with(tmp_path, [slow_b, slow_b, fine, slow_c, slow_c, slow_c, slow_c])
    lines = [check.check(step) for step in range(1, 75)]
    assert len(said) == 1
    assert said[0].startswith("step 60: rank 2 on c computes 2.0 x slower")
    (fault,) = map(json.loads, (tmp_path / "faults.jsonl").read_text().splitlines())
    assert (fault["kind"], fault["of_rank"], fault["of_host"], fault["times_slower"]) == ("slow_rank", 2, "c", 2.0)
    assert lines[9] == {"slowest_rank": 1, "slowest_rank_over_median": 3.0}
    assert [bool(line) for line in lines[:20]] == [False] * 9 + [True] + [False] * 9 + [True]


@pytest.mark.parametrize("every", [None, 10])
def test_without_a_period_or_alone_nothing_is_gathered(tmp_path: Path, every: int | None) -> None:
    engine: Any = SimpleNamespace(place=SimpleNamespace(is_first=True))
    hosts = HOSTS if every is None else ["a"]
    check = StragglerCheck(StragglerSection(every=every), engine, hosts, FaultLog(tmp_path, 0), print)
    assert check.check(10) == {}


def test_the_probe_takes_time_and_no_random_numbers() -> None:
    before = torch.get_rng_state()
    assert time_products(torch.device("cpu")) > 0
    assert torch.equal(torch.get_rng_state(), before)
