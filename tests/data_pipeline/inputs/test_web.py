"""Web pages, from WARC files and from folders: which records are pages, and which characters they are."""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_pipeline.inputs.charset import UndecodableError, decode_html, web_encoding

Read = Callable[..., Any]
PAGE = "<html><body>caf\u00e9 na\u00efve \u20ac</body></html>"
SENTENCE = "\u041f\u0440\u043e\u0433\u0440\u0430\u043c\u043c\u0430 \u0447\u0438\u0442\u0430\u0435\u0442. "
RUSSIAN = f"<html><body>{SENTENCE * 9}"


def records(packed: bool = True) -> list[bytes]:
    """Seven WARC records written by another library: pages at positions 1, 3 and 6."""
    bodies: list[tuple[str, str, bytes, list[tuple[str, str]]]] = [
        ("request", "", b"GET / HTTP/1.1\r\n\r\n", []),
        ("response", "200 OK", PAGE.encode("cp1252"), [("Content-Type", "text/html; charset=ISO-8859-1")]),
        ("response", "404 Not Found", b"<html>gone</html>", [("Content-Type", "text/html")]),
        (
            "response",
            "200 OK",
            gzip.compress(PAGE.encode()),
            [("Content-Type", "application/xhtml+xml"), ("Content-Encoding", "gzip")],
        ),
        ("response", "200 OK", b"\x89PNG", [("Content-Type", "image/png")]),
        ("metadata", "", b"a: b", []),
        ("response", "200 OK", PAGE.encode(), [("Content-Type", "TEXT/HTML")]),
    ]
    result = []
    for number, (kind, status, body, headers) in enumerate(bodies):
        output = io.BytesIO()
        writer = WARCWriter(output, gzip=packed)
        http = StatusAndHeaders(status, headers, "HTTP/1.1") if kind == "response" else None
        record = writer.create_warc_record(f"http://a/{number}", kind, payload=io.BytesIO(body), http_headers=http)
        writer.write_record(record)
        result.append(output.getvalue())
    return result


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.warc.gz", b"".join(records())),
        ("a.warc", b"".join(records(packed=False))),
        ("a.warc.gz", gzip.compress(b"".join(records(packed=False)))),
        ("a.warc.zst", zstandard.compress(b"".join(records(packed=False)))),
    ],
)
def test_the_html_responses_of_a_warc_file_are_read(tmp_path: Path, read: Read, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    reading = read(tmp_path)
    assert reading.texts == [PAGE] * 3
    assert reading.bad == []
    metadata = [document.metadata for document in reading.documents]
    assert [values["origin"]["position"] for values in metadata] == [1, 3, 6]
    assert [values["url"] for values in metadata] == ["http://a/1", "http://a/3", "http://a/6"]
    assert {values["media_type"] for values in metadata} == {"text/html"}
    assert len({document.id for document in reading.documents}) == 3


def test_a_damaged_member_costs_one_record(tmp_path: Path, read: Read) -> None:
    members = records()
    damaged = bytearray(members[3])
    damaged[20:60] = bytes(40)
    (tmp_path / "a.warc.gz").write_bytes(b"".join((*members[:3], bytes(damaged), *members[4:])))
    reading = read(tmp_path)
    assert [document.metadata["origin"]["position"] for document in reading.documents] == [1, 6]
    assert [(bad["reason"], bad["where"], bad["loses_rest"]) for bad in reading.bad] == [
        ("damaged", "a.warc.gz, record 3", False)
    ]


@pytest.mark.parametrize("packed", [True, False])
def test_a_truncated_warc_file_is_damaged_and_what_is_before_is_read(tmp_path: Path, read: Read, packed: bool) -> None:
    content = b"".join(records(packed))
    (tmp_path / ("a.warc.gz" if packed else "a.warc")).write_bytes(content[:-40])
    reading = read(tmp_path)
    assert [document.metadata["origin"]["position"] for document in reading.documents] == [1, 3]
    assert [(bad["reason"], bad["position"], bad["loses_rest"]) for bad in reading.bad] == [("damaged", 6, True)]


def test_pages_over_the_limit_and_wrong_encodings_are_put_aside(tmp_path: Path, read: Read) -> None:
    output = io.BytesIO()
    writer = WARCWriter(output, gzip=True)
    html = ("Content-Type", "text/html")
    for body, headers in (
        (b"a" * 5000, [html]),
        (gzip.compress(b"a" * 500_000), [html, ("Content-Encoding", "gzip")]),
        (b"not gzip", [html, ("Content-Encoding", "gzip")]),
        (b"fine", [html]),
    ):
        http = StatusAndHeaders("200 OK", headers, "HTTP/1.1")
        writer.write_record(writer.create_warc_record("http://a", "response", io.BytesIO(body), http_headers=http))
    (tmp_path / "a.warc.gz").write_bytes(output.getvalue())
    reading = read(tmp_path, max_document_bytes=4000)
    assert reading.reasons == ["too_large", "too_large", "undecodable"]
    assert reading.texts == ["fine"]


def test_pages_of_a_folder_are_read_with_their_markup(tmp_path: Path, read: Read) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.html").write_bytes(b'<meta charset="latin1">' + PAGE.encode("cp1252"))
    (tmp_path / "b" / "c.htm.gz").write_bytes(gzip.compress(PAGE.encode()))
    (tmp_path / "b" / "style.css").write_text("a {}")
    (tmp_path / "d.html").write_bytes(bytes(range(256)))
    reading = read(tmp_path)
    assert [(document.id, document.text[-len(PAGE) :]) for document in reading.documents] == [
        ("a.html", PAGE),
        ("b/c.htm.gz", PAGE),
    ]
    assert {document.metadata["media_type"] for document in reading.documents} == {"text/html"}
    assert reading.reasons == ["undecodable"]
    assert reading.tables[0].left_out == {"*.css": 1}


@pytest.mark.parametrize(
    ("content", "header", "text"),
    [
        (PAGE.encode(), None, PAGE),
        (b"\xef\xbb\xbf" + PAGE.encode(), "latin1", PAGE),
        (b"\xff\xfe" + PAGE.encode("utf-16-le"), "utf-8", PAGE),
        (PAGE.encode("cp1252"), "ascii", PAGE),
        (PAGE.encode(), "x-unknown", PAGE),
        (PAGE.encode(), "rot13", PAGE),
        (PAGE.encode(), "gb2312", PAGE),  # declared, but it does not fit; UTF-8 does
        (RUSSIAN.encode("koi8-r"), "KOI8-R", RUSSIAN),
        (RUSSIAN.encode("cp1251"), None, RUSSIAN),  # nothing declared: detected
        (b"<meta charset=utf-16>" + PAGE.encode(), None, "<meta charset=utf-16>" + PAGE),
        (b"a" * 500 + b"\xff", "utf-8", "a" * 500 + "\ufffd"),  # one slip in UTF-8
    ],
)
def test_characters_are_found_by_mark_header_meta_and_bytes(content: bytes, header: str | None, text: str) -> None:
    assert decode_html(content, header) == text


def test_a_meta_declaration_beyond_the_first_1024_bytes_does_not_count() -> None:
    late = b"<html>" + b" " * 1100 + b'<meta charset="koi8-r">'
    assert decode_html(late + "\u00e9".encode()).endswith("\u00e9")


@given(st.binary(max_size=300), st.one_of(st.none(), st.text(max_size=12), st.sampled_from(["utf-16", "gbk", "idna"])))
def test_any_bytes_are_text_or_undecodable(content: bytes, header: str | None) -> None:
    with contextlib.suppress(UndecodableError):
        decode_html(content, header).encode()


def test_only_encodings_of_the_web_are_looked_up() -> None:
    for label in ("hex", "zlib", "unicode_escape", "idna", "utf-7", "undefined", "mbcs", "", "\0", "a" * 5000):
        assert web_encoding(label) is None
    assert web_encoding(' "UTF8" ') == "utf-8"
    for label in ("Shift_JIS", "x-sjis", "EUC-KR", "big5", "windows-1257", "ISO-8859-9"):
        assert label == "x-sjis" or web_encoding(label)
