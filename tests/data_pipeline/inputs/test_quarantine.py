"""The quarantine: every record accounted for, and the whole input judged, however the work is dealt."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import DataSettings
from data_pipeline.execution.tally import read_tallies, tally_sum
from data_pipeline.inputs import quarantine
from data_pipeline.inputs.quarantine import describe_quarantine
from launch.settings import BadInputError

Read = Callable[..., Any]
GOOD = b'{"text": "good", "domain": "web"}\n'


def write(folder: Path, good: int, bad: int) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD * good + b"{broken}\n" * bad)
    return folder


@pytest.mark.parametrize(
    ("good", "bad", "limits", "problem"),
    [
        (10, 0, {}, None),
        (100, 10, {}, None),  # few, though many of a hundred
        (100, 11, {}, "11 of 111 records are bad (11 not_json), more than inputs.max_bad_records = 10 and"),
        (11_000, 11, {}, None),  # no more than one in a thousand
        (100, 1, {"max_bad_records": 0}, "1 of 101 records are bad"),
        (100, 50, {"max_bad_fraction": 0.5}, None),
        (0, 3, {}, "all of its 3 records are bad (3 not_json); the first: a.jsonl, byte 0: is not JSON"),
    ],
)
def test_a_run_ends_when_too_much_of_a_source_is_bad(
    tmp_path: Path, read: Read, good: int, bad: int, limits: dict[str, Any], problem: str | None
) -> None:
    folder = write(tmp_path / "in", good, bad)
    for piece_bytes in (10**9, 100_000, 50):  # judged alike however the work is dealt
        if piece_bytes == 50 and good > 1000:
            continue
        reading = read(folder, piece_bytes=piece_bytes, **limits)
        assert (len(reading.texts), len(reading.bad)) == (good, bad)
        if problem is None:
            reading.check()
        else:
            with pytest.raises(BadInputError) as caught:
                reading.check()
            assert problem in str(caught.value)
            assert str(caught.value).startswith("sources.0 (in): ")


def test_each_source_is_judged_by_itself(tmp_path: Path, read: Read) -> None:
    large, small = write(tmp_path / "large", 30_000, 0), write(tmp_path / "small", 5, 20)
    with pytest.raises(BadInputError, match=r"sources\.1 \(small\): 20 of 25 records"):
        read(large, small).check()


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_a_damaged_file_is_judged_as_a_file(tmp_path: Path, read: Read, suffix: str) -> None:
    compress = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}[suffix]
    packed = compress(GOOD * 20_000)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[:-10])
    for number in range(9):
        (tmp_path / f"b{number}.jsonl.{suffix}").write_bytes(compress(GOOD))
    reading = read(tmp_path)
    assert 9 < len(reading.texts) <= 20_009
    assert [(bad["reason"], bad["loses_rest"]) for bad in reading.bad] == [("damaged", True)]
    with pytest.raises(BadInputError, match=rf"1 of 10 files .* are damaged.*the first: a\.jsonl\.{suffix}, byte \d+:"):
        reading.check()
    read(tmp_path, max_bad_fraction=0.1).check()


def test_counts_and_lines_agree_and_a_file_that_is_all_bad_is_not_copied(
    tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "MOST_WRITTEN", 5)
    reading = read(write(tmp_path / "in", 3, 20))
    assert len(reading.bad) == 5
    assert read_tallies(reading.folder / "tallies" / "quarantined") == {
        "not_json\ttext\t0": {"documents": 20, "bytes": 20 * len(b"{broken}")}
    }
    assert describe_quarantine(reading.folder) == (
        f"20 bad records put aside (not_json 20): {reading.folder / 'quarantine'}"
    )
    assert describe_quarantine(tmp_path) is None


def test_the_report_accounts_for_what_was_put_aside_and_limits_are_judged_anew(
    tmp_path: Path,
    small_documents: list[dict[str, Any]],
    corpus_writer: Callable[..., None],
    settings_for: Callable[..., DataSettings],
    run_pipeline: Callable[[DataSettings], list[str]],
) -> None:
    corpus_writer(tmp_path / "in", small_documents)
    with (tmp_path / "in" / "b.jsonl").open("wb") as file:
        file.write(b"{broken}\n\xff\n")
    output = tmp_path / "out"
    with pytest.raises(BadInputError, match="2 of 206 records are bad"):
        run_pipeline(settings_for(tmp_path / "in", output, inputs={"max_bad_records": 1}))
    assert not (output / "manifest.json").exists()
    printed = run_pipeline(settings_for(tmp_path / "in", output, inputs={"max_bad_records": 2}))
    assert any(line.startswith("clean") and "already done" in line for line in printed)
    assert any("2 bad records put aside (invalid_utf8 1, not_json 1)" in line for line in printed)
    report = json.loads((output / "report.json").read_text())
    groups = [*report["quarantined"].values(), *report["dropped"].values(), report["train"], report["validation"]]
    assert tally_sum(report["read"]) == {
        unit: sum(tally_sum(group)[unit] for group in groups) for unit in ("documents", "bytes")
    }
    assert tally_sum(report["read"])["documents"] == 206


def parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.bz2", "a.jsonl.zst", "a.parquet"]
NAMES += ["a.warc", "a.warc.gz", "a.warc.zst", "a.html", "a.txt", "a.md.gz"]
WARC = (
    b"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: 60\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html>page</html>\r\n\r\n"
)
SEEDS = [GOOD * 3, gzip.compress(GOOD * 3), lzma.compress(GOOD), zstandard.compress(GOOD), parquet(["a", "b", "c"])]
SEEDS += [WARC * 2, gzip.compress(WARC) * 2, b"<meta charset=koi8-r>", b"WARC/1.0\r\n"]


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    content=st.one_of(st.binary(max_size=300), st.sampled_from(SEEDS)),
    edits=st.lists(st.tuples(st.integers(0, 600), st.binary(max_size=4)), max_size=3),
    cut=st.integers(0, 700),
    piece_bytes=st.sampled_from([1, 20, 10**6]),
)
def test_any_bytes_in_a_file_of_any_name_are_documents_or_bad_records(
    tmp_path_factory: pytest.TempPathFactory,
    read: Read,
    name: str,
    content: bytes,
    edits: list[tuple[int, bytes]],
    cut: int,
    piece_bytes: int,
) -> None:
    edited = bytearray(content)
    for position, replacement in edits:
        edited[position : position + len(replacement)] = replacement
    path = tmp_path_factory.getbasetemp() / "fuzz" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(edited[:cut]))
    reading = read(path, piece_bytes=piece_bytes, max_document_bytes=200)
    for document in reading.documents:
        assert len(document.text.encode()) <= 1000
    assert all(bad["reason"] and bad["problem"] and bad["position"] >= 0 for bad in reading.bad)
    positions = [document.metadata["origin"]["position"] for document in reading.documents]
    assert positions == sorted(set(positions))
