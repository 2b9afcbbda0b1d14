"""All kinds of input in one preparation, to a published data set, and every document's way back to its raw bytes.

The raw files are read again by other libraries (warcio, pyarrow, gzip, zstandard) at the position that ``inspect``
names, so what is checked is that a user who sees a document in the data set finds it in the dump.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from warcio.archiveiterator import ArchiveIterator
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_pipeline.dataset.reader import open_dataset
from data_pipeline.main import main
from launch.settings import BadInputError

WORDS = "the of and to that have with river mountain letter evening market captain garden winter answer window"
KEYWORDS = "amber birch cedar delta ember falcon grove heron island jasper kestrel lagoon maple nectar opal pine"
DOCUMENTS_PER_FILE = 8
SOURCES = ("warc", "pages", "parquet", "notes", "gz", "zst")


def marker(source: str, number: int) -> str:
    """A sentence that no other document has; without digits, which the near-duplicate search takes for one another."""
    words = KEYWORDS.split()
    return f"Keyword {source} {words[number]} {words[-number]} stands here alone."


def paragraph(name: str) -> str:
    """Twelve unrepetitive English-looking sentences."""
    generator = Random(name)
    return " ".join(" ".join(generator.choices(WORDS.split(), k=generator.randint(6, 14))) + "." for _ in range(12))


def text_of(source: str, number: int) -> str:
    paragraphs = [paragraph(f"{source} {number} {part}") for part in range(3)]
    return "\n\n".join([paragraphs[0], f"{marker(source, number)} {paragraphs[1]}", paragraphs[2]])


def page_of(source: str, number: int) -> str:
    body = "".join(f"<p>{text}</p>" for text in text_of(source, number).split("\n\n"))
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/all'>All pages</a></li></ul></nav>"
    head = f"<head><title>Page</title><script>var x = {number};</script></head>"
    return f"<!doctype html><html>{head}<body>{menu}<main>{body}</main></body></html>"


def write_warc(path: Path) -> None:
    """Each page behind the request for it, as crawlers write them."""
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number in range(DOCUMENTS_PER_FILE):
            url, content = f"http://a.example/{number}", page_of("warc", number).encode("cp1252")
            http = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=windows-1252")], "HTTP/1.1")
            asked = StatusAndHeaders("GET / HTTP/1.1", [], is_http_request=True)
            writer.write_record(writer.create_warc_record(url, "request", http_headers=asked))
            writer.write_record(
                writer.create_warc_record(url, "response", payload=io.BytesIO(content), http_headers=http)
            )


def write_inputs(folder: Path) -> None:
    """A folder for each kind of source."""
    for source in SOURCES:
        (folder / source).mkdir(parents=True)
    numbers = range(DOCUMENTS_PER_FILE)
    write_warc(folder / "warc" / "crawl.warc.gz")
    for number in numbers:
        (folder / "pages" / f"page{number}.html").write_text(page_of("pages", number))
        note = folder / "notes" / ("deep/deeper" if number % 2 else "top") / f"note{number}.md"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"# Notes\n\n{text_of('notes', number)}\n")
    table = pa.table(
        {"content": [text_of("parquet", number) for number in numbers], "domain": ["tables"] * len(numbers)}
    )
    pq.write_table(table, folder / "parquet" / "rows.parquet", row_group_size=3)
    for source in ("gz", "zst"):
        records = [{"id": f"{source}{number}", "text": text_of(source, number)} for number in numbers]
        lines = [json.dumps(record).encode() for record in records]
        if source == "gz":
            lines.insert(3, b'{"text": cut off')
            (folder / "gz" / "part.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
        else:
            (folder / "zst" / "part.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines)))


def raw_document(path: Path, position: int) -> str:
    """What another library finds in a raw file at a document's position."""
    if path.suffix == ".parquet":
        return str(pq.read_table(path)["content"][position].as_py())
    if path.name.endswith(".warc.gz"):
        with path.open("rb") as file:
            records = [record.content_stream().read() for record in ArchiveIterator(file)]
        return records[position].decode("cp1252")
    if ".jsonl" in path.name:
        packed = path.read_bytes()
        lines = gzip.decompress(packed) if path.suffix == ".gz" else zstandard.decompress(packed)
        return str(json.loads(lines[position:].split(b"\n")[0])["text"])
    assert position == 0
    return path.read_text()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the raw inputs, the settings and the data set ``out``."""
    folder = tmp_path_factory.mktemp("formats")
    write_inputs(folder)
    sources: list[dict[str, Any]] = [{"path": str(folder / source), "domain": source} for source in SOURCES]
    sources[SOURCES.index("parquet")] |= {"text_key": "content"}
    values = {
        "name": "formats",
        "output": str(folder / "out"),
        "sources": sources,
        "split": {"validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 420},
        "inputs": {"piece_bytes": 20_000},
    }
    (folder / "formats.json").write_text(json.dumps(values))
    assert main(["--config", str(folder / "formats.json")]) == 0
    return folder


def test_documents_of_every_kind_are_published_and_one_bad_record_is_put_aside(prepared: Path) -> None:
    dataset = open_dataset(prepared / "out", verify=True)
    assert dataset.domains == tuple(sorted({*SOURCES, "tables"} - {"parquet"}))
    report = json.loads((prepared / "out" / "report.json").read_text())
    assert report["quarantined"]["not_json"]["gz"]["documents"] == 1
    assert report["dropped"] == {}
    published = {
        domain: sum(report[split].get(domain, {"documents": 0})["documents"] for split in ("train", "validation"))
        for domain in dataset.domains
    }
    assert published == dict.fromkeys(dataset.domains, DOCUMENTS_PER_FILE)


@pytest.mark.parametrize("source", SOURCES)
def test_inspect_leads_back_to_the_raw_document(
    prepared: Path, source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # a place on one line
    files = set()
    for number in range(DOCUMENTS_PER_FILE):
        shown = ""
        for split in ("train", "validation"):
            arguments = ["inspect", str(prepared / "out"), "--split", split, "--search", marker(source, number)]
            with contextlib.suppress(BadInputError):  # it is in the other split
                assert main(arguments) == 0
            shown += capsys.readouterr().out
        (place,) = re.findall(rf" {source}: (\S+) at ([\d,]+) ", shown)
        raw = raw_document(prepared / source / place[0], int(place[1].replace(",", "")))
        assert marker(source, number) in raw
        assert paragraph(f"{source} {number} 2") in raw
        files.add(place[0])
        if source in ("warc", "pages"):
            assert "All pages" not in shown
            assert "<p>" not in shown
    assert len(files) == (DOCUMENTS_PER_FILE if source in ("pages", "notes") else 1)
