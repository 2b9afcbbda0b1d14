"""A process's rank, from whichever launcher started it."""

from __future__ import annotations

import os

import pytest

from launch.environment import Place, discover_place, prepare_rendezvous
from launch.settings import BadInputError


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place(0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, Place(3, 8)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Place(1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, Place(1, 4)),
    ],
)
def test_rank_is_found(variables: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert discover_place() == place
    assert place.is_first == (place.rank == 0)


@pytest.mark.parametrize("variables", [{"RANK": "two", "WORLD_SIZE": "4"}, {"RANK": "4", "WORLD_SIZE": "4"}])
def test_impossible_ranks_end_in_one_line(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInputError, match="RANK"):
        discover_place()


def test_a_process_alone_gets_a_rendezvous_and_a_launched_one_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "keep")
    prepare_rendezvous(Place(0, 2))
    prepare_rendezvous(Place(0, 1))
    assert os.environ["MASTER_PORT"] == "keep"
    monkeypatch.delenv("MASTER_ADDR")
    prepare_rendezvous(Place(0, 1))
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(os.environ["MASTER_PORT"]) > 0
