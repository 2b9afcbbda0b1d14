"""Readers: every format, every document, and bad input named by file and line instead of skipped."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_pipeline.config import SourceSettings
from data_pipeline.inputs.readers import DocumentReader, InputFile, find_source_files, read_documents
from launch.settings import BadInputError

RECORDS = [{"text": f"text {number} \u00e9", "id": str(number)} for number in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd_in_two_frames(content: bytes) -> bytes:
    return zstandard.compress(content[:37]) + zstandard.compress(content[37:])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".bz2", bz2.compress),
        (".zst", zstandard.compress),
        (".zst", zstd_in_two_frames),
    ],
)
def test_every_compression_gives_every_document(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(LINES))
    documents = list(read_documents(InputFile(path, domain="prose")))
    assert [document.text for document in documents] == [record["text"] for record in RECORDS]
    assert documents[3].metadata == {"domain": "prose", "source": "a"}


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)]
)
def test_a_truncated_file_is_an_error_not_a_shorter_corpus(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(LINES)[:-6])
    with pytest.raises(BadInputError, match=r"a\.jsonl.*: cannot be read"):
        list(read_documents(InputFile(path)))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": ', "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"text": 5}', "line 2: 'text' is not a string"),
        ('{"text": "a", "metadata": {"domain": 3}}', "line 2: the domain is not a string"),
        ('{"text": "\\ud800"}', "line 2: not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(BadInputError, match=problem):
        list(read_documents(InputFile(path)))


def test_the_domain_comes_from_metadata_then_the_record_then_the_source(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    records = [{"text": "x", "metadata": {"domain": "one"}, "domain": "two"}, {"text": "x", "domain": "two"}]
    path.write_text("\n".join(json.dumps(record) for record in [*records, {"text": "x"}]))
    documents = list(read_documents(InputFile(path, domain="three")))
    assert [document.metadata["domain"] for document in documents] == ["one", "two", "three"]
    assert [document.id for document in documents] == ["a.jsonl/1", "a.jsonl/2", "a.jsonl/3"]


def test_tasks_share_files_without_loss_or_overlap(tmp_path: Path) -> None:
    files = []
    for number in range(5):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"text": "t", "id": str(number)}))
        files.append(InputFile(path))
    for world_size in (1, 2, 7):
        ids = [doc.id for rank in range(world_size) for doc in DocumentReader(files).run(None, rank, world_size)]
        assert sorted(ids) == ["0", "1", "2", "3", "4"]


def test_a_missing_folder_and_an_empty_one_are_named_by_setting(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"sources\.0\.path = .*: no such folder"):
        find_source_files([SourceSettings(path=str(tmp_path / "no"))])
    with pytest.raises(BadInputError, match=r"sources\.0\.pattern = .*: matches no file"):
        find_source_files([SourceSettings(path=str(tmp_path))])
