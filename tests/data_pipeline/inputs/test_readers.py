"""Files between stages: every document, metadata untouched, and damage is an error with its file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from datatrove.data import Document

from data_pipeline.execution.tally import DocumentWriter
from data_pipeline.inputs.readers import DocumentReader, InputFile, read_documents, stage_files
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
    documents = list(read_documents(InputFile(path)))
    assert [document.text for document in documents] == [record["text"] for record in RECORDS]
    assert documents[3].metadata == {"domain": "text", "source": "a"}


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
        ('{"text": "a", "metadata": [1]}', "line 2: 'metadata' is not an object"),
        ('{"text": "a", "metadata": {"domain": 3}}', "line 2: the domain is not a string"),
        ('{"text": "\\ud800"}', "line 2: not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(BadInputError, match=problem):
        list(read_documents(InputFile(path)))


def test_what_a_stage_writes_the_next_one_reads_unchanged(tmp_path: Path) -> None:
    origin = {"source": 1, "file": 2, "position": 3}
    metadata = {"domain": "web", "source": "crawl", "origin": origin, "media_type": "text/html", "extra": [1, None]}
    documents = [Document(text=f"{n} \u2028 \n", id=f"d{n}", metadata={**metadata, "n": n}) for n in range(3)]
    list(DocumentWriter(tmp_path).run(iter(documents), rank=0))
    list(DocumentWriter(tmp_path).run(iter([]), rank=1))
    files = stage_files(tmp_path)
    assert [file.path.name for file in files] == ["00000.jsonl.zst", "00001.jsonl.zst"]
    assert [document for file in files for document in read_documents(file)] == documents


def test_tasks_share_files_without_loss_or_overlap(tmp_path: Path) -> None:
    files = []
    for number in range(5):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"text": "t", "id": str(number)}))
        files.append(InputFile(path))
    for world_size in (1, 2, 7):
        ids = [doc.id for rank in range(world_size) for doc in DocumentReader(files).run(None, rank, world_size)]
        assert sorted(ids) == ["0", "1", "2", "3", "4"]


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"gone\.jsonl: cannot be read \(No such file"):
        list(read_documents(InputFile(tmp_path / "gone.jsonl")))


def test_reading_is_faster_than_datatroves_reader(tmp_path: Path) -> None:
    from datatrove.pipeline.readers import JsonlReader

    documents = [Document(text=f"{n} " + "some words " * 150, id=str(n), metadata={"domain": "a"}) for n in range(8000)]
    list(DocumentWriter(tmp_path).run(iter(documents), rank=0))

    def seconds(reader: DocumentReader | JsonlReader) -> float:
        start = time.process_time()
        assert sum(1 for _ in reader.run(None, 0, 1)) == len(documents)
        return time.process_time() - start

    ours = min(seconds(DocumentReader(stage_files(tmp_path))) for _ in range(3))
    assert ours < min(seconds(JsonlReader(str(tmp_path))) for _ in range(3))
