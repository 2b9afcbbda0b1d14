"""The shard format: what goes in comes out, other programs read it in place, and nothing damaged is opened."""

from __future__ import annotations

import contextlib
import hashlib
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.manifest import SHARD_SUFFIXES
from data_pipeline.dataset.megatron import index_chunks
from data_pipeline.dataset.shards import (
    DOCUMENT,
    UNKNOWN_SOURCE,
    Origin,
    ShardWriter,
    check_shard,
    dtype_for,
    open_shard,
    read_description,
    shard_file,
)
from launch.settings import BadInputError

VOCABULARIES = st.sampled_from([300, 2**16, 2**16 + 1, 200_000])
Documents = list[tuple[list[int], int, int, Origin]]


@st.composite
def shards(draw: st.DrawFn) -> tuple[int, Documents]:
    vocab_size = draw(VOCABULARIES)
    ids = st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=20)
    origin = st.builds(Origin, st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**63))
    document = st.tuples(ids, st.integers(0, 2**40), st.integers(0, 2**16 - 1), origin)
    return vocab_size, draw(st.lists(document, min_size=1, max_size=12))


def write(path: Path, vocab_size: int, documents: Documents) -> None:
    with ShardWriter(path, vocab_size) as writer:
        for document in documents:
            writer.add(*document)


def write_two(path: Path, vocab_size: int = 500) -> None:
    write(path, vocab_size, [([7, 8, 1], 11, 2, Origin(1, 2, 3)), ([9, 1], 5, 0, Origin(0, 70_000, 2**40))])


def read_megatron(path: Path) -> list[np.ndarray]:
    """Megatron's documented layout, read with nothing of ours."""
    index = path.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack("<QBQQ", index[9:34])
    assert (version, documents) == (1, sequences + 1)
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    bounds = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    assert 34 + 12 * sequences + 8 * documents == len(index)
    assert bounds.tolist() == list(range(documents))
    dtype, payload = {8: "<u2", 4: "<i4"}[code], path.read_bytes()
    return [np.frombuffer(payload, dtype, n, at) for n, at in zip(lengths, pointers, strict=True)]


@settings(max_examples=60)
@given(shards())
def test_a_shard_gives_back_every_document_and_megatron_reads_the_same(content: tuple[int, Documents]) -> None:
    vocab_size, documents = content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bin"
        write(path, vocab_size, documents)
        shard = open_shard(path)
        check_shard(shard, vocab_size, 2**16)
        assert [shard.document(i).tolist() for i in range(len(documents))] == [ids for ids, *_ in documents]
        assert [ids.tolist() for ids in read_megatron(path)] == [ids for ids, *_ in documents]
        assert shard.utf8_bytes.tolist() == [size for _, size, _, _ in documents]
        assert shard.domain_ids.tolist() == [domain for _, _, domain, _ in documents]
        assert [Origin(*origin.item()) for origin in shard.origins] == [origin for *_, origin in documents]
        assert shard.dtype == ("uint16" if vocab_size <= 65536 else "uint32")


def test_deepspeed_reads_an_index_of_four_byte_tokens(tmp_path: Path) -> None:
    indexed = pytest.importorskip("deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset")
    write_two(tmp_path / "a.bin", 100_000)
    read = indexed.MMapIndexedDataset(str(tmp_path / "a"), skip_warmup=True)
    assert [read[i].tolist() for i in range(len(read))] == [[7, 8, 1], [9, 1]]


def test_datatrove_reads_tokens_and_positions_of_documents_in_place(tmp_path: Path) -> None:
    from datatrove.utils.dataset import DatatroveFileDataset

    documents = [([number + 2] * length + [1], 1, 0, Origin(0, 0, 0)) for number, length in enumerate((3, 9, 1, 6))]
    write(tmp_path / "a.bin", 300, documents)
    stream = [token for ids, *_ in documents for token in ids]
    positions = [position for ids, *_ in documents for position in range(len(ids))]
    read = DatatroveFileDataset(str(tmp_path / "a.bin"), seq_len=5, token_size=2, return_positions=True)
    assert len(read) == len(stream) // 6
    for number in range(len(read)):
        item = read[number]
        assert item["input_ids"].tolist() == stream[6 * number : 6 * number + 6]
        # A window's first token counts from 0 there, until the next document begins.
        starts = [i for i in range(6) if positions[6 * number + i] == 0]
        first = starts[0] if starts else 6
        assert item["positions"].tolist()[first:] == positions[6 * number + first : 6 * number + 6]


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_two(path)
    assert path.read_bytes() == np.array([7, 8, 1, 9, 1], "<u2").tobytes()
    assert (tmp_path / "a.bin.index").read_bytes() == np.array([3, 5], "<u8").tobytes()
    records = struct.pack("<QQIHH", 11, 3, 2, 1, 2) + struct.pack("<QQIHH", 5, 2**40, 70_000, 0, 0)
    assert (tmp_path / "a.documents").read_bytes() == records
    assert DOCUMENT.itemsize == 24


def test_the_description_has_the_hashes_and_counts_of_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_two(path)
    description = read_description(path)
    for kind in SHARD_SUFFIXES:
        content = shard_file(path, kind).read_bytes()
        entry = getattr(description.entry.files, kind)
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (description.entry.tokens, description.entry.documents, description.entry.utf8_bytes) == (5, 2, 16)
    assert description.by_domain.tolist() == [[2, 1, 5], [0, 0, 0], [3, 1, 11]]


def test_copied_ranges_are_the_same_documents_whatever_the_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [([2 + i % 250] * (i % 7) + [1], i, i % 3, Origin(0, i, i)) for i in range(100)]
    write(tmp_path / "whole.bin", 300, documents)
    write(tmp_path / "part.bin", 300, documents[13:57])
    monkeypatch.setattr("data_pipeline.dataset.shards.COPY_TOKENS", 5)
    monkeypatch.setattr("data_pipeline.dataset.shards.COPY_DOCUMENTS", 3)
    monkeypatch.setattr("data_pipeline.dataset.megatron.CHUNK_DOCUMENTS", 4)
    with ShardWriter(tmp_path / "copy.bin", 300) as writer:
        writer.copy(open_shard(tmp_path / "whole.bin"), 13, 30)
        writer.copy(open_shard(tmp_path / "whole.bin"), 30, 57)
    for kind in SHARD_SUFFIXES:
        expected = shard_file(tmp_path / "part.bin", kind).read_bytes()
        assert shard_file(tmp_path / "copy.bin", kind).read_bytes() == expected


@pytest.mark.parametrize("kind", SHARD_SUFFIXES)
@settings(max_examples=25)
@given(content=shards(), data=st.data())
def test_a_file_cut_or_extended_anywhere_is_refused_by_name(
    kind: str, content: tuple[int, Documents], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bin"
        write(path, *content)
        file = shard_file(path, kind)
        whole = file.read_bytes()
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(BadInputError, match=r"truncated|bad header"):
            open_shard(path)
        file.write_bytes(whole + b"\0")
        with pytest.raises(BadInputError, match=f"{file.name}: wrong size"):
            open_shard(path)


@settings(max_examples=150)
@given(st.fixed_dictionaries({kind: st.binary(max_size=120) for kind in SHARD_SUFFIXES}), st.booleans())
def test_any_bytes_are_a_shard_or_a_bad_input(content: dict[str, bytes], valid_index: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.bin"
        if valid_index:  # as deep as garbage can get: sizes that agree
            documents = len(content["documents"]) // 24
            ends = (content["document_ends"] + bytes(8 * documents))[: 8 * documents]
            index = b"".join(index_chunks(np.frombuffer(ends, "<u8"), "uint16"))
            content |= {"document_ends": ends, "megatron_index": index}
            content["documents"] = content["documents"][: 24 * documents]
            if documents:
                content["tokens"] = content["tokens"] + bytes(2 * int.from_bytes(ends[-8:], "little") % 1000)
        for kind, value in content.items():
            shard_file(path, kind).write_bytes(value)
        with contextlib.suppress(BadInputError):
            check_shard(open_shard(path), 300, 4)


def test_an_unfinished_shard_cannot_be_opened_or_merged(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    writer = ShardWriter(path, 300)
    writer.add([5] * 100, 1, 0)
    with pytest.raises(BadInputError, match=r"a\.idx: cannot be read"):
        open_shard(path)
    with pytest.raises(BadInputError, match="its writing was cut off"):
        read_description(path)
    with pytest.raises(ZeroDivisionError), ShardWriter(path, 300) as again:
        again.add([5], 1 // 0, 0)
    assert not shard_file(path, "megatron_index").exists()


def damage(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


@pytest.mark.parametrize(
    ("kind", "at", "content", "message"),
    [
        ("document_ends", 0, struct.pack("<Q", 6), r"a\.bin\.index: document boundaries do not rise"),
        ("document_ends", 0, struct.pack("<Q", 0), r"a\.bin\.index: document boundaries do not rise"),
        ("tokens", 2, struct.pack("<H", 500), r"a\.bin: a token id is not below vocab_size = 500"),
        ("documents", 22, struct.pack("<H", 3), r"a\.documents: a domain id"),
        ("megatron_index", 34, struct.pack("<i", 2), r"a\.idx: does not describe the documents"),
        ("megatron_index", 0, b"X", r"a\.idx: bad header: not a Megatron index"),
        ("megatron_index", 17, b"\x06", r"a\.idx: bad header: dtype code 6"),
    ],
)
def test_content_that_contradicts_itself_is_found_by_a_check(
    tmp_path: Path, kind: str, at: int, content: bytes, message: str
) -> None:
    path = tmp_path / "a.bin"
    write_two(path)
    check_shard(open_shard(path), 500, 3)
    damage(shard_file(path, kind), at, content)
    with pytest.raises(BadInputError, match=message):
        check_shard(open_shard(path), 500, 3)


def test_a_missing_shard_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no\.bin: cannot be read") as caught:
        open_shard(tmp_path / "no.bin")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[], [300], [-1, 5]])
def test_the_writer_refuses_ids_outside_the_vocabulary_and_empty_documents(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids"), ShardWriter(tmp_path / "a.bin", 300) as writer:
        writer.add(ids, 1, 0)


def test_an_origin_that_is_not_given_is_unknown(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin", 300) as writer:
        writer.add([1], 1, 0)
    assert open_shard(tmp_path / "a.bin").origins[0].item() == (UNKNOWN_SOURCE, 0, 0)


@given(st.integers(1, 2**31))
def test_the_dtype_holds_every_id_and_is_the_smallest(vocab_size: int) -> None:
    dtype = dtype_for(vocab_size)
    assert np.iinfo(dtype).max >= vocab_size - 1
    assert dtype.itemsize == 2 or vocab_size > 2**16
