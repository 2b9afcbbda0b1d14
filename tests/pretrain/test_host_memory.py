"""Freed memory stays with a rank, until the machine runs short of it."""

from __future__ import annotations

import ctypes
import multiprocessing

import psutil
import pytest

from pretrain.host_memory import give_back_when_short, keep_freed_memory

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")

BLOCK, BLOCKS = 2**20, 200


def _holes() -> tuple[int, int, bool, int]:
    """Resident bytes with every other block freed: at first, with memory to spare (and the answer), with little."""
    keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        libc.memset(block, 1, BLOCK)
    for block in blocks[::2]:
        libc.free(block)
    resident = psutil.Process().memory_info().rss
    not_short = give_back_when_short(0.0)
    kept = psutil.Process().memory_info().rss
    give_back_when_short(1.0)
    return resident, kept, not_short, psutil.Process().memory_info().rss


def test_free_blocks_between_used_ones_go_back_only_when_memory_is_short() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its allocator is set, for ever
        resident, kept, not_short, returned = pool.apply(_holes)
    assert not not_short
    freed = BLOCK * BLOCKS // 2
    assert abs(kept - resident) < freed // 10
    assert resident - returned > 0.8 * freed
