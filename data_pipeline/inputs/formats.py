"""Which format a file has, by its name, and which reader reads it."""

from __future__ import annotations

from collections.abc import Callable

from data_pipeline.inputs.jsonl import read_jsonl
from data_pipeline.inputs.parquet import read_parquet
from data_pipeline.inputs.parts import Compression, Format, Found, Part
from data_pipeline.inputs.streams import StoredFile
from data_pipeline.inputs.text import read_text
from data_pipeline.inputs.warc import read_warc
from data_pipeline.inputs.web_page import read_html

READERS: dict[Format, Callable[[Part, StoredFile, int], Found]] = {
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "warc": read_warc,
    "html": read_html,
    "text": read_text,
}
SUFFIXES: dict[str, Format] = {
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "parquet": "parquet",
    "warc": "warc",
    "html": "html",
    "htm": "html",
    "xhtml": "html",
    "txt": "text",
    "md": "text",
    "markdown": "text",
    "rst": "text",
}
COMPRESSIONS: dict[str, Compression] = {"gz": "gz", "xz": "xz", "bz2": "bz2", "zst": "zst", "zstd": "zst"}
# How many bytes of text a compressed byte stands for, roughly: to make pieces even, nothing depends on it.
EXPANSION = 4


def compression_of(name: str) -> Compression | None:
    """How a file is compressed, by its last suffix."""
    return COMPRESSIONS.get(name.rpartition(".")[2].lower())


def format_of(name: str) -> Format | None:
    """The format that a file's suffixes stand for, or None."""
    if compression_of(name):
        name = name.rpartition(".")[0]
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return SUFFIXES.get(suffix.lower()) if dot and stem else None
