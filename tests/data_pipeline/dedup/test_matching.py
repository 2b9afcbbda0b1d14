"""Equal keys are found, all of them, however the key space is dealt to tasks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipeline.dedup.clusters import ClusterPairs, flatten, link, removal_file
from data_pipeline.dedup.matching import FROM_INDEX, MatchKeys, count_ranges, equal_rows
from data_pipeline.dedup.records import Layout, read_range, sample_first_column, write_signatures

KEYS = hnp.arrays(np.uint64, st.tuples(st.integers(0, 40), st.integers(1, 3)), elements=st.integers(0, 3))


@given(KEYS)
def test_equal_rows_pairs_every_row_with_the_first_of_its_kind(keys: np.ndarray) -> None:
    first_seen: dict[tuple[int, ...], int] = {}
    expected = set()
    for row, key in enumerate(map(tuple, keys.tolist())):
        if first_seen.setdefault(key, row) != row:
            expected.add((first_seen[key], row))
    first, other = equal_rows(keys)
    assert len(first) == len(expected)
    assert set(zip(first.tolist(), other.tolist(), strict=True)) == expected


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_linking_gives_the_connected_components_each_under_its_lowest_member(
    graph: tuple[int, list[tuple[int, int]]],
) -> None:
    n, edges = graph
    lowest = list(range(n))
    for _ in range(n):
        for a, b in edges:
            lowest[a] = lowest[b] = min(lowest[a], lowest[b])
    parent = np.arange(n)
    half = len(edges) // 2
    for part in (edges[:half], edges[half:]):
        pairs = np.array(part, np.int64).reshape(-1, 2)
        link(parent, pairs[:, 0], pairs[:, 1])
    flatten(parent)
    assert parent.tolist() == lowest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(0, 51), st.none() | st.integers(0, 51))
def test_a_range_holds_exactly_the_records_whose_key_is_in_it(
    tmp_path: Path, values: list[int], low: int, high: int | None
) -> None:
    layout = Layout("made", 1, 1)
    write_signatures(layout, tmp_path, 0, np.array(values, np.uint64).reshape(-1, 1, 1), [np.arange(len(values))])
    records = read_range(layout.signature_file(tmp_path, 0, 0), layout.record, low, high)
    wanted = [(value, place) for place, value in enumerate(values) if value >= low and (high is None or value < high)]
    assert [(int(r["key"][0]), int(r["document"])) for r in records] == sorted(wanted)


def make_signatures(folder: Path, layout: Layout, pieces: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for piece in range(pieces):
        keys = generator.integers(0, 12, (50 * (piece != 2), layout.buckets, layout.columns), np.uint64)
        write_signatures(layout, folder, piece, keys, [np.arange(len(keys))])


def match(folder: Path, layout: Layout, signatures: Path, ranges: int, earlier: tuple[Path, ...] = ()) -> set[bytes]:
    pairs = folder / "pairs"
    step = MatchKeys(layout, signatures, 4, ranges, pairs, earlier, folder / "index")
    for rank in reversed(range(layout.buckets * ranges)):
        step.run(None, rank, layout.buckets * ranges)
    files = sorted(pairs.iterdir())
    assert len(files) == layout.buckets * ranges
    content = [(path.name[:10], path.read_bytes()) for path in files]
    return {bucket.encode() + data[i : i + 16] for bucket, data in content for i in range(0, len(data), 16)}


def test_more_ranges_give_the_same_pairs_and_the_same_index(tmp_path: Path) -> None:
    layout = Layout("made", buckets=3, columns=2)
    make_signatures(tmp_path / "signatures", layout, 4, seed=0)
    size = layout.signature_file(tmp_path / "signatures", 0, 0).stat().st_size
    assert count_ranges(layout, tmp_path / "signatures", 4, range_bytes=size) == 3
    whole = match(tmp_path / "one", layout, tmp_path / "signatures", 1)
    parts = match(tmp_path / "five", layout, tmp_path / "signatures", 5)
    assert whole == parts
    assert len(whole) > 20
    for bucket in range(3):
        one, five = (
            b"".join(path.read_bytes() for path in layout.index_files(tmp_path / name / "index", bucket))
            for name in ("one", "five")
        )
        assert one == five
        keys = np.frombuffer(one, "<u8").reshape(-1, 2).tolist()
        assert all(a < b for a, b in pairwise(keys)), "sorted, each once"


def test_keys_of_an_index_are_matched_and_not_written_again(tmp_path: Path) -> None:
    layout = Layout("made", buckets=1, columns=1)
    make_signatures(tmp_path / "a", layout, 4, seed=1)
    make_signatures(tmp_path / "b", layout, 4, seed=2)
    match(tmp_path / "out_a", layout, tmp_path / "a", 2)
    found = match(tmp_path / "out_b", layout, tmp_path / "b", 3, (tmp_path / "out_a" / "index",))
    known, new = (
        {key for path in layout.index_files(tmp_path / f"out_{name}" / "index", 0) for key in np.fromfile(path, "<u8")}
        for name in "ab"
    )
    everything = {
        int(key)
        for piece in range(4)
        for key in np.fromfile(layout.signature_file(tmp_path / "b", 0, piece), layout.record)["key"][:, 0]
    }
    assert new == everything - known
    from_index = [pair for pair in found if pair[10:14] == FROM_INDEX.to_bytes(4, "little")]
    assert from_index
    assert not any(pair[18:22] == FROM_INDEX.to_bytes(4, "little") for pair in found), "an index loses nothing"


def test_samples_are_spread_over_all_files(tmp_path: Path) -> None:
    layout = Layout("made", 1, 1)
    for piece, values in enumerate(([1, 2, 3, 4], [], [10, 20, 30, 40, 50, 60])):
        write_signatures(
            layout, tmp_path, piece, np.array(values, np.uint64).reshape(-1, 1, 1), [np.arange(len(values))]
        )
    files = [layout.signature_file(tmp_path, 0, piece) for piece in range(3)]
    assert sample_first_column(files, layout.record.itemsize, 5).tolist() == [1, 3, 10, 30, 50]


def test_a_signature_file_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(13))
    with pytest.raises(RuntimeError, match="13 bytes are not a whole number of records of 12 bytes"):
        read_range(tmp_path / "file", Layout("made", 1, 1).record)


def test_matches_of_other_documents_are_an_error(tmp_path: Path) -> None:
    layout = Layout("made", 1, 1)
    (tmp_path / "bucket_000_00000.pairs").write_bytes(np.array([0, 0, 1, 5], "<u4").tobytes())
    with pytest.raises(RuntimeError, match="mixed up"):
        ClusterPairs(layout, tmp_path, 1, [3, 5], tmp_path / "out").run()
    with pytest.raises(RuntimeError, match="1 files of matches where 2 were written"):
        ClusterPairs(layout, tmp_path, 2, [3, 6], tmp_path / "out").run()
    ClusterPairs(layout, tmp_path, 1, [3, 6], tmp_path / "out").run()
    assert removal_file(tmp_path / "out", 0).read_bytes() == b""
    assert np.fromfile(removal_file(tmp_path / "out", 1), "<u4").tolist() == [5, 0, 0]
