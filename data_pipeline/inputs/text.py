"""Text and Markdown files: one document a file, as it is.

A byte order mark decides the encoding; otherwise it is the source's ``encoding``, UTF-8 by default, and a file that is
not in it is bad, not mended by guessing. Markdown is text: its marks are few, and models are meant to know them.
"""

from __future__ import annotations

import codecs

from data_pipeline.inputs.charset import byte_order_mark
from data_pipeline.inputs.parts import BadRecord, Found, Part, bad_record
from data_pipeline.inputs.streams import StoredFile, decompressed, whole

# What text has none of: control characters but for tab, line feed, vertical tab, form feed, carriage return, escape.
_CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")
BINARY_FRACTION = 0.01


def read_text(part: Part, stored: StoredFile, max_bytes: int) -> Found:
    """The document in a file; its id is the file's name."""
    content = whole(decompressed(stored, part.compression), max_bytes)
    if isinstance(content, BadRecord):
        yield content
        return
    mark, marked = byte_order_mark(content)
    encoding = marked or part.encoding
    if not mark and is_binary(content):
        yield bad_record(0, "binary", "has NUL or many control characters, so it is no text", content)
        return
    try:
        text = content[len(mark) :].decode(encoding)
        text.encode()  # lone surrogates, which some encodings let through
    except UnicodeError as error:
        reason = "invalid_utf8" if codecs.lookup(encoding).name == "utf-8" else "undecodable"
        yield bad_record(0, reason, f"is not text in {encoding} ({str(error)[-80:]})", content)
        return
    yield part.document(0, text, part.name)


def is_binary(content: bytes) -> bool:
    """Whether bytes are something else than text in an encoding that extends ASCII."""
    if b"\0" in content:
        return True
    return len(content) - len(content.translate(None, _CONTROLS)) > BINARY_FRACTION * len(content)
