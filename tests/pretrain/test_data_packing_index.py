"""The table of a packing in files: the same rows, made once by many processes, whole or absent."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset.reader import Dataset
from launch.settings import BadInputError
from pretrain.config import DataSection
from pretrain.data import open_sampler, packing_index, sequences
from pretrain.data.packing import BestFit, PackingCache
from pretrain.data.packing_index import PackedPieces, index_in_files, index_in_memory
from pretrain.data.selection import DocumentStream

LENGTH, END = 24, 1


def parts(seed: int = 0, fail_after: int | None = None) -> Iterator[PackedPieces]:
    """Three windows of random pieces."""
    generator = np.random.default_rng(seed)
    for number in range(3):
        if number == fail_after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sizes = generator.integers(1, 4, 50)
        count = int(sizes.sum())
        starts, lengths = generator.integers(0, 2**40, count), generator.integers(1, 100, count)
        yield PackedPieces(starts, lengths, generator.random(count) < 0.2, sizes)


def never() -> Iterator[PackedPieces]:
    raise AssertionError("made a second time")
    yield


def make_and_report(cache: Path, done: Path) -> None:
    """What one of several processes does; notes that it was the one that made the table."""

    def watched() -> Iterator[PackedPieces]:
        (done / str(os.getpid())).touch()
        yield from parts()

    assert index_in_files(cache, "key", 100, watched()).starts.size > 100


def test_a_table_in_files_is_the_table_in_memory_and_is_made_once(tmp_path: Path) -> None:
    wanted = index_in_memory(parts())
    for found in (index_in_files(tmp_path, "key", 100, parts()), index_in_files(tmp_path, "key", 100, never())):
        for name in packing_index.TYPES:
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
            assert getattr(found, name).dtype == getattr(wanted, name).dtype
    other = index_in_files(tmp_path, "another key", 100, parts(seed=1))
    assert not np.array_equal(other.starts, wanted.starts)


def test_many_processes_at_once_make_one_table(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=make_and_report, args=(tmp_path / "cache", tmp_path / "done")) for _ in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * 6
    assert len(list((tmp_path / "done").iterdir())) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("damage", ["cut", "gone", "other key", "not json", "other format"])
def test_a_table_that_is_not_whole_or_not_this_one_is_made_again(tmp_path: Path, damage: str) -> None:
    wanted = index_in_files(tmp_path, "key", 100, parts())
    expected = np.array(wanted.starts)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    described = folder / "index.json"
    values = json.loads(described.read_text())
    if damage == "cut":
        with (folder / "starts.bin").open("r+b") as file:
            file.truncate(80)
    elif damage == "gone":
        (folder / "continues.bin").unlink()
    elif damage == "not json":
        described.write_text("{")
    else:
        key = {"other key": "key", "other format": "format_version"}[damage]
        described.write_text(json.dumps({**values, key: 7}))
    np.testing.assert_array_equal(index_in_files(tmp_path, "key", 100, parts()).starts, expected)
    index_in_files(tmp_path, "key", 100, never())


def test_a_full_disk_names_the_setting_and_leaves_nothing_half(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"No space left on device\); set data\.cache to a folder with room"):
        index_in_files(tmp_path, "key", 100, parts(fail_after=2))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    index_in_files(tmp_path, "key", 100, parts())


def test_waiting_for_another_process_has_an_end_and_what_a_killed_one_left_goes(tmp_path: Path) -> None:
    index_in_files(tmp_path, "key", 100, parts())
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    shutil.rmtree(folder)
    lock, half = tmp_path / f"{folder.name}.lock", tmp_path / f".{folder.name}.0123.partial"
    half.mkdir()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def hold() -> None:
        with lock.open("w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            theirs.send("held")
            theirs.recv()

    holder = context.Process(target=hold)
    holder.start()
    assert ours.recv() == "held"
    with pytest.raises(BadInputError, match=r"another process has been making this table for 1 s; .*data\.cache"):
        index_in_files(tmp_path, "key", 100, never(), wait_seconds=1)
    holder.kill()
    holder.join()
    index_in_files(tmp_path, "key", 100, parts(), wait_seconds=60)
    assert not half.exists()


def test_a_packing_reads_the_same_rows_from_files(dataset: Dataset, tmp_path: Path) -> None:
    stream = DocumentStream(dataset.split("train"))
    in_memory = BestFit(stream, LENGTH, END)
    for _ in range(2):
        in_files = BestFit(stream, LENGTH, END, PackingCache(tmp_path, "key", 10))
        assert (in_files.n_rows, in_files.index_bytes) == (in_memory.n_rows, in_memory.index_bytes)
        for row in range(in_memory.n_rows):
            for one, other in zip(
                in_files.read(row, 0, LENGTH, True), in_memory.read(row, 0, LENGTH, True), strict=True
            ):
                np.testing.assert_array_equal(one, other)


def test_a_run_keeps_the_tables_of_large_data_sets_and_each_selection_has_its_own(
    dataset_maker: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = dataset_maker(tmp_path / "made")
    source = {"path": str(dataset.folder), "name": "s"}
    section = {"packing": "best_fit", "sequence_length": LENGTH, "global_batch_size": 2}

    def rows(**settings: object) -> list[list[int]]:
        changed = {key: value for key, value in settings.items() if key != "cache"}
        values = {**section, "sources": [{**source, **changed}], "cache": settings.get("cache")}
        sampler = open_sampler(DataSection.model_validate(values), 3, 300, dataset)
        return [row.tokens.tolist() for row in sampler.rows(range(20))]

    def tables(folder: Path) -> int:
        return len([path for path in folder.iterdir() if path.is_dir()]) if folder.is_dir() else 0

    small = rows()
    assert tables(dataset.folder / ".cache") == 0, "small ones are packed in memory"
    monkeypatch.setattr(sequences, "CACHED_DOCUMENTS", 1)
    assert rows() == rows() == small
    assert tables(dataset.folder / ".cache") == 1
    assert rows(cache=str(tmp_path / "elsewhere")) == small
    assert tables(tmp_path / "elsewhere") == 1
    assert rows(domains=["a"]) != small
    assert tables(dataset.folder / ".cache") == 2
