"""Text and Markdown trees: one document a file, and what is no text is put aside."""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import SourceSettings

Read = Callable[..., Any]


def test_a_tree_is_read_as_it_is_in_the_order_of_names(tmp_path: Path, read: Read) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + "\u00e9".encode("utf-16-le"))
    (tmp_path / "deep" / "README.md").write_bytes(b"# Title\r\n\n*text*")
    (tmp_path / "deep" / "er" / "b.rst.gz").write_bytes(gzip.compress(b"rst"))
    (tmp_path / "z.txt").write_bytes(b"")
    (tmp_path / ".txt").write_bytes(b"a hidden file without a suffix")
    reading = read(tmp_path)
    assert [(document.id, document.text) for document in reading.documents] == [
        ("a.txt", "\u00e9"),
        ("deep/README.md", "# Title\r\n\n*text*"),
        ("deep/er/b.rst.gz", "rst"),
        ("z.txt", ""),
    ]
    assert reading.tables[0].left_out == {"*.txt": 1}
    assert "media_type" not in reading.documents[0].metadata


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x7fELF\x02\x01\x01\0\0\0", "binary"),
        (bytes(range(1, 20)), "binary"),
        (b"caf\xe9", "invalid_utf8"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8", "undecodable"),
        (b"x" * 2000, "too_large"),
    ],
)
def test_what_is_no_text_is_put_aside(tmp_path: Path, read: Read, content: bytes, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(b"fine")
    reading = read(tmp_path, max_document_bytes=1000)
    assert (reading.texts, reading.reasons) == (["fine"], [reason])
    assert reading.bad[0]["where"] == "a.txt"


def test_the_encoding_of_text_is_a_setting(tmp_path: Path, read: Read) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read({"path": str(tmp_path), "encoding": "latin-1"}).texts == ["caf\u00e9"]
    for encoding in ("latin-99", "hex", "rot13"):
        with pytest.raises(ValidationError, match="is not an encoding of text"):
            SourceSettings(path="x", encoding=encoding)
