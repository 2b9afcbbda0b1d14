"""WARC, the archive format of web crawls (ISO 28500): the HTML pages among its responses.

FastWARC reads the records, whether they are compressed one by one (as they should be) or all together. A record's
position is its number in the file, counting records of every kind. What is no page (requests, pictures, answers other
than 2xx) is passed over, and counted. Chunked and compressed HTTP bodies are undone.

FastWARC gives out what there is of a record that is cut off, without a word, so lengths are compared. After damage,
reading goes on at the next gzip member, if the file is made of such: one record is lost, not the rest of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document

from data_pipeline.inputs.charset import UndecodableError, decode_html
from data_pipeline.inputs.parts import DAMAGED, BadRecord, Found, Part, bad_record
from data_pipeline.inputs.streams import READ_BYTES, StoredFile, too_large
from data_pipeline.inputs.web_page import HTML

PAGE_TYPES = (HTML, "application/xhtml+xml")
GZIP_MEMBER = b"\x1f\x8b\x08"
# FastWARC's own, and those of the streams below it.
DAMAGE = (OSError, EOFError, ValueError, RuntimeError)


class _CutOffError(ValueError):
    """A record is shorter than it says."""


def read_warc(part: Part, stored: StoredFile, max_bytes: int) -> Found:
    """The pages of a file; an empty file has none."""
    number = 0
    start: int | None = 0
    damage: BadRecord | None = None
    while start is not None:
        try:
            for record in _records(stored, start):
                found = _read_record(record, part, number + (damage is not None), max_bytes)
                if damage is not None:
                    yield damage
                    number, damage = number + 1, None
                yield found
                number += 1
                start = max(start, record.stream_pos)
            if damage is None:
                return
        except DAMAGE as error:
            if damage is None:
                damage = BadRecord(number, DAMAGED, f"the WARC data is damaged: {' '.join(str(error).split())[:300]}")
        start = _next_member(stored, start + 1)
    if damage is not None:
        yield dataclasses.replace(damage, loses_rest=True)


def _records(stored: StoredFile, start: int) -> Iterator[Any]:
    from fastwarc.warc import ArchiveIterator, any_type

    stored.seek(start)
    yield from ArchiveIterator(stored, record_types=any_type, parse_http=False)


def _next_member(stored: StoredFile, start: int) -> int | None:
    """Where the next gzip member may begin, at ``start`` or later."""
    stored.seek(start)
    tail = b""
    while chunk := stored.read(READ_BYTES):
        content = tail + chunk
        index = content.find(GZIP_MEMBER)
        if index >= 0:
            return start + index
        tail = content[-2:]
        start += len(content) - len(tail)
    return None


def _read_record(record: Any, part: Part, number: int, max_bytes: int) -> Document | BadRecord | None:
    from fastwarc.warc import WarcRecordType

    length = record.headers.get("Content-Length")
    if length is None:
        raise _CutOffError("a record's header is cut off")
    if record.record_type != WarcRecordType.response or not record.is_http:
        return None
    if record.content_length > max_bytes:
        return BadRecord(number, "too_large", too_large(max_bytes), record.content_length)
    content = record.reader.read()
    if len(content) < record.content_length:
        raise _CutOffError(f"a record of {record.content_length} bytes ends after {len(content)}")
    return _page(content, record.headers.get("WARC-Target-URI"), record.record_id, part, number, max_bytes)


def _page(
    content: bytes, url: str | None, identity: str | None, part: Part, number: int, max_bytes: int
) -> Document | BadRecord | None:
    """The page in an HTTP response."""
    from fastwarc.warc import WarcRecord

    # A record of its own: a body that cannot be decoded would end the iteration over the file.
    response = WarcRecord()
    response.set_bytes_content(content)
    response.is_http = True
    try:
        response.parse_http(auto_decode="all")
        status = response.http_headers.status_code if response.http_headers else None
        if status is None:
            return bad_record(number, "not_http", "is not an HTTP response", content)
        if not 200 <= status < 300 or (response.http_content_type or "").lower() not in PAGE_TYPES:
            return None
        body = response.reader.read(max_bytes + 1)
    except DAMAGE as error:
        return bad_record(number, "undecodable", f"its HTTP encoding is wrong ({error})", content)
    if len(body) > max_bytes:
        return bad_record(number, "too_large", too_large(max_bytes), body)
    try:
        text = decode_html(body, response.http_charset)
    except UndecodableError as error:
        return bad_record(number, "undecodable", str(error), body)
    named = {"url": url.encode("utf-8", "replace").decode()} if url else {}
    identity = identity.encode("utf-8", "replace").decode() if identity else None
    return part.document(number, text, identity, media_type=HTML, **named)
