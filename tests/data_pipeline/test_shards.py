"""The shard format: what goes in comes out, and nothing damaged is opened."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.dataset.shards import HEADER, MAGIC, VERSION, ShardWriter, dtype_code_for, dtype_name, open_shard
from launch.settings import BadInputError

VOCABULARIES = st.sampled_from([300, 2**16, 2**16 + 1, 200_000])


@st.composite
def shards(draw: st.DrawFn) -> tuple[int, list[tuple[list[int], int, int]]]:
    vocab_size = draw(VOCABULARIES)
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20)
    document = st.tuples(ids, st.integers(0, 2**40), st.integers(0, 2**16 - 1))
    return vocab_size, draw(st.lists(document, min_size=1, max_size=12))


def write(path: Path, vocab_size: int, documents: list[tuple[list[int], int, int]]) -> None:
    with ShardWriter(path, vocab_size) as writer:
        for document in documents:
            writer.add(*document)


@given(shards())
def test_a_shard_gives_back_every_document_with_its_size_and_domain(
    content: tuple[int, list[tuple[list[int], int, int]]],
) -> None:
    vocab_size, documents = content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tokens"
        write(path, vocab_size, documents)
        shard = open_shard(path)
        assert [shard.document(i).tolist() for i in range(len(documents))] == [ids for ids, _, _ in documents]
        assert shard.utf8_bytes.tolist() == [size for _, size, _ in documents]
        assert shard.domain_ids.tolist() == [domain for _, _, domain in documents]
        assert shard.dtype == ("uint16" if vocab_size <= 65536 else "uint32")
        assert shard.vocab_size == vocab_size


@given(shards(), st.data())
def test_a_shard_cut_or_extended_anywhere_is_refused(
    content: tuple[int, list[tuple[list[int], int, int]]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tokens"
        write(path, *content)
        whole = path.read_bytes()
        size = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:size])
        with pytest.raises(BadInputError, match="truncated"):
            open_shard(path)
        path.write_bytes(whole + b"\0")
        with pytest.raises(BadInputError, match="wrong size"):
            open_shard(path)


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write(path, 500, [([7, 8, 1], 11, 2), ([9, 1], 5, 0)])
    expected = b"".join(
        [
            MAGIC + np.array([VERSION, 1], "<u4").tobytes() + np.array([500, 5, 2], "<u8").tobytes() + bytes(24),
            np.array([7, 8, 1, 9, 1], "<u2").tobytes() + bytes(6),
            np.array([3, 5], "<u8").tobytes(),
            np.array([11, 5], "<u8").tobytes(),
            np.array([2, 0], "<u2").tobytes(),
        ]
    )
    assert path.read_bytes() == expected


def test_an_unfinished_shard_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    writer = ShardWriter(path, 300)
    writer.add([5] * 100, 1, 0)
    writer._file.flush()
    with pytest.raises(BadInputError, match="bad header"):
        open_shard(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [(0, b"SOMETHIN", "not an Ice shard"), (1, 9, "version 9"), (2, 7, "dtype code 7"), (3, 70_000, "vocabulary")],
)
def test_a_foreign_header_is_refused(tmp_path: Path, field: int, value: object, message: str) -> None:
    path = tmp_path / "a.tokens"
    write(path, 300, [([1, 2], 1, 0)])
    content = path.read_bytes()
    header = list(HEADER.unpack(content[: HEADER.size]))
    header[field] = value
    path.write_bytes(HEADER.pack(*header) + content[HEADER.size :])
    with pytest.raises(BadInputError, match=message):
        open_shard(path)


def test_boundaries_that_do_not_rise_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write(path, 300, [([1, 2], 1, 0), ([3, 4], 1, 0)])
    content = bytearray(path.read_bytes())
    content[HEADER.size + 8 : HEADER.size + 16] = np.array([4], "<u8").tobytes()
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="boundaries"):
        open_shard(path)


def test_a_missing_shard_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no\.tokens: cannot be read") as caught:
        open_shard(tmp_path / "no.tokens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[], [300], [-1, 5]])
def test_the_writer_refuses_ids_outside_the_vocabulary_and_empty_documents(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids"), ShardWriter(tmp_path / "a.tokens", 300) as writer:
        writer.add(ids, 1, 0)


@given(st.integers(1, 2**32))
def test_the_dtype_holds_every_id_and_is_the_smallest(vocab_size: int) -> None:
    name = dtype_name(dtype_code_for(vocab_size))
    assert np.iinfo(name).max >= vocab_size - 1
    assert name == "uint16" or vocab_size > 2**16
