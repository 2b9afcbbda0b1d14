"""JSON lines: one object a line, UTF-8; plain or compressed.

A record's position is the offset of its first byte in the decompressed file. A plain file can be read in ranges of
bytes: a record belongs to the range that its first byte is in, so that ranges which meet share all records without loss
or overlap, wherever they are cut. For that, a range reads on past its end to finish its last record, and begins after
the first newline at or after ``start - 1``.
"""

from __future__ import annotations

import codecs
import dataclasses
from typing import Any

import orjson
from datatrove.data import Document

from data_pipeline.inputs.parts import BadRecord, Found, Part, bad_record, excerpt_of
from data_pipeline.inputs.streams import StoredFile, decompressed, lines
from launch.settings import BadInputError


def read_jsonl(part: Part, stored: StoredFile, max_bytes: int) -> Found:
    """The records of a part."""
    start = max(part.start - 1, 0)
    if start:
        stored.seek(start)
    content = decompressed(stored, part.compression)
    for position, line in lines(content, max_bytes, start, skip_first=part.start > 0):
        if part.end is not None and position >= part.end:
            return
        if isinstance(line, BadRecord):
            yield line
            continue
        if not position:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line and not line.isspace():
            yield parse_line(line, part, position)


def required_object(line: bytes, where: str, content: str) -> dict[str, Any]:
    """The object of a line of a file in which no line may be bad; ``content`` says what it should have.

    Raises ``BadInputError`` that begins with ``where``.
    """
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadInputError(f"{where}: not JSON ({error}); correct or remove the line") from None
    if not isinstance(values, dict):
        raise BadInputError(f"{where}: not an object with {content}")
    return values


def parse_line(line: bytes, part: Part, position: int) -> Document | BadRecord:
    """The document of one line."""
    try:
        values = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as decoding:
            return bad_record(position, "invalid_utf8", f"is not UTF-8 ({decoding.reason})", line)
        return bad_record(position, "not_json", f"is not JSON ({error})", line)
    if not isinstance(values, dict):
        return bad_record(position, "not_an_object", f"is not an object with a {part.text_key!r}", line)
    found = part.from_record(position, values, len(line))
    return dataclasses.replace(found, excerpt=excerpt_of(line)) if isinstance(found, BadRecord) else found
