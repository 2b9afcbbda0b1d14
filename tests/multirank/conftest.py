"""Pools of 2 and 4 ranks for the whole session, and the modules beside the tests importable by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rank_pool import RankPool


@pytest.fixture(scope="session")
def _pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        pool = pools.get(world_size)
        if pool is None or not pool.alive:
            pools[world_size] = pool = RankPool(world_size, tmp_path_factory.mktemp(f"ranks_{world_size}"))
        return pool

    yield pool_of
    for pool in pools.values():
        if pool.alive:
            pool.close()


@pytest.fixture
def pool_of(_pools: Callable[[int], RankPool]) -> Callable[[int], RankPool]:
    """``pool_of(n)``: the session's pool of n ranks; a new one when a test broke the last."""
    return _pools


@pytest.fixture
def two_ranks(_pools: Callable[[int], RankPool]) -> RankPool:
    """The session's pool of 2 ranks."""
    return _pools(2)
