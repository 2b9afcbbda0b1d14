"""Published shards: every document once, in piece order, cut by size alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.manifest import SHARD_SUFFIXES
from data_pipeline.dataset.merge import MergeShards, plan_shards, shard_name
from data_pipeline.dataset.shards import ShardWriter, open_shard, shard_file

LENGTHS = st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=6)


def write_pieces(folder: Path, lengths: list[list[int]]) -> list[Path]:
    paths = []
    number = 0
    for index, piece in enumerate(lengths):
        paths.append(folder / f"{index:05d}.bin")
        with ShardWriter(paths[-1], 2**16) as writer:
            for length in piece:
                writer.add([number] * length, number, number % 3)
                number += 1
    return paths


def cut(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """The rule, said plainly: close a shard after the document that brings it to ``max_tokens``."""
    shards: list[list[int]] = [[]]
    for length in lengths:
        if sum(shards[-1]) >= max_tokens:
            shards.append([])
        shards[-1].append(length)
    return [shard for shard in shards if shard]


@settings(max_examples=40)
@given(LENGTHS, st.integers(1, 30))
def test_every_document_is_in_one_shard_in_order_and_shards_are_cut_by_the_rule(
    lengths: list[list[int]], max_tokens: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = plan_shards(write_pieces(folder, lengths), max_tokens)
        merge = MergeShards(plan, folder / "out", 2**16)
        for rank in range(len(plan)):
            assert list(merge.run(None, rank, len(plan))) == []
        flat = [length for piece in lengths for length in piece]
        found, numbers = [], []
        for number in range(len(plan)):
            shard = open_shard(folder / "out" / shard_name(number))
            found.append(np.diff(shard.document_ends.astype(np.int64), prepend=0).tolist())
            numbers += [int(shard.document(i)[0]) for i in range(shard.document_ends.size)]
            assert shard.utf8_bytes.tolist() == numbers[-shard.document_ends.size :]
        assert found == cut(flat, max_tokens)
        assert numbers == list(range(len(flat)))


def test_shards_do_not_depend_on_how_documents_are_dealt_to_pieces_or_tasks(tmp_path: Path) -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    whole = plan_shards(write_pieces(tmp_path / "one", [lengths]), 10)
    parts = plan_shards(write_pieces(tmp_path / "many", [lengths[:1], [], lengths[1:7], lengths[7:]]), 10)
    assert len(whole) == len(parts) > 2
    for rank in range(2):
        list(MergeShards(whole, tmp_path / "a", 2**16).run(None, rank, 2))
    list(MergeShards(parts, tmp_path / "b", 2**16).run(None, 0, 1))
    for number in range(len(whole)):
        for kind in SHARD_SUFFIXES:
            first = shard_file(tmp_path / "a" / shard_name(number), kind).read_bytes()
            assert first == shard_file(tmp_path / "b" / shard_name(number), kind).read_bytes()
