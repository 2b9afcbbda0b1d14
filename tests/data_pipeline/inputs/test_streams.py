"""Decompression and lines: exact, bounded in memory, and damage is found where it is."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import tracemalloc
from collections.abc import Callable, Iterator
from typing import BinaryIO, cast

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.inputs.parts import BadRecord, Compression
from data_pipeline.inputs.streams import DamagedError, StoredFile, decompressed, lines
from launch.settings import BadInputError

COMPRESSORS: dict[Compression, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard.compress,
}
KINDS = sorted(COMPRESSORS)


def stored(content: bytes) -> StoredFile:
    return StoredFile(cast(BinaryIO, io.BytesIO(content)), "test")


def pieces_of(content: bytes, sizes: list[int]) -> Iterator[bytes]:
    while content:
        size = sizes.pop() if sizes else len(content)
        yield content[:size]
        content = content[size:]


@given(st.binary(max_size=400), st.sampled_from(KINDS), st.integers(1, 3))
def test_members_of_a_compressed_file_are_all_read(content: bytes, kind: Compression, members: int) -> None:
    packed = COMPRESSORS[kind](content) * members
    assert b"".join(decompressed(stored(packed), kind)) == content * members


@given(st.binary(min_size=1, max_size=400), st.sampled_from(KINDS), st.data())
def test_a_truncation_anywhere_is_damage(content: bytes, kind: Compression, data: st.DataObject) -> None:
    packed = COMPRESSORS[kind](content)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(DamagedError):
        list(decompressed(stored(packed[:cut]), kind))


@given(st.binary(max_size=300), st.sampled_from(KINDS))
def test_any_bytes_are_content_or_damage(content: bytes, kind: Compression) -> None:
    with contextlib.suppress(DamagedError):
        assert all(decompressed(stored(content), kind))


@given(st.lists(st.binary(max_size=12)), st.lists(st.integers(1, 9)), st.integers(0, 5))
def test_lines_are_those_of_split_whatever_the_chunks(parts: list[bytes], sizes: list[int], offset: int) -> None:
    content = b"\n".join(parts)
    expected, position = [], offset
    for line in content.split(b"\n"):
        expected.append((position, line))
        position += len(line) + 1
    found = list(lines(pieces_of(content, sizes), 100, offset))
    assert [(at, line) for at, line in found if line.strip()] == [(at, line) for at, line in expected if line.strip()]


@given(st.lists(st.binary(max_size=30)), st.lists(st.integers(1, 9)))
def test_long_lines_are_named_with_their_size_whatever_the_chunks(parts: list[bytes], sizes: list[int]) -> None:
    content = b"\n".join(parts)
    found = {at: line.size for at, line in lines(pieces_of(content, sizes), 8) if isinstance(line, BadRecord)}
    position, expected = 0, {}
    for line in content.split(b"\n"):
        if len(line) > 8:
            expected[position] = len(line)
        position += len(line) + 1
    assert {at: size for at, size in found.items() if content[at : at + size].strip()} == {
        at: size for at, size in expected.items() if content[at : at + size].strip()
    }


def peak_bytes(run: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_newlines_without_end_cost_no_memory(kind: Compression) -> None:
    count = 300_000_000
    packed = COMPRESSORS[kind](b"\n" * 3_000_000) * 100

    def run() -> None:
        assert list(lines(decompressed(stored(packed), kind), 1000)) == []
        assert sum(map(len, decompressed(stored(packed), kind))) == count

    assert peak_bytes(run) < 16e6


def test_a_line_of_100_mb_costs_no_memory() -> None:
    packed = zstandard.compress(b"a\n" + b"x" * 100_000_000 + b"\nb")
    found: list[tuple[int, bytes | BadRecord]] = []
    assert peak_bytes(lambda: found.extend(lines(decompressed(stored(packed), "zst"), 1_000_000))) < 8e6
    (_, first), (at, long), last = found
    assert (first, at, last) == (b"a", 2, (100_000_003, b"b"))
    assert isinstance(long, BadRecord)
    assert (long.reason, long.size, long.excerpt[:3]) == ("too_large", 100_000_000, "xxx")


def test_a_storage_that_fails_is_not_taken_for_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read(min(size or 50, 50))

    for kind, compress in COMPRESSORS.items():
        file = StoredFile(cast(BinaryIO, Failing(compress(bytes(range(256)) * 20))), "disk")
        with pytest.raises(BadInputError, match=r"disk: cannot be read \(Input/output error\)"):
            list(decompressed(file, kind))
