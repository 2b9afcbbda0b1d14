"""What one task reads, and what it finds: a part of a file on one side, documents and bad records on the other.

A *part* is a whole file, a range of bytes of plain JSON lines, or a range of row groups of a Parquet file. A format's
reader turns a part and its open file into a stream of three things, all of them with the position that makes a
document traceable:

- ``Document``: what goes on to cleaning;
- :class:`BadRecord`: what cannot be used, with its reason (quarantine.py);
- ``None``: what is no document at all, such as a picture in a WARC file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from datatrove.data import Document

Format = Literal["jsonl", "parquet", "warc", "html", "text"]
Compression = Literal["gz", "xz", "bz2", "zst"]

EXCERPT_BYTES = 200
MAX_NAME_CHARACTERS = 200

DAMAGED = "damaged"


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used.

    Attributes:
        position: Where it is, in the unit of a document's position (see :meth:`Part.document`).
        reason: One of a few names, for counting, such as ``not_json``.
        problem: What is wrong, for people.
        size: Bytes of the record, as far as they are known.
        excerpt: Its first bytes, readable whatever they are.
        loses_rest: What follows in the part cannot be read because of it: an unknown number of records.
    """

    position: int
    reason: str
    problem: str
    size: int = 0
    excerpt: str = ""
    loses_rest: bool = False


Found = Iterator["Document | BadRecord | None"]


def bad_record(position: int, reason: str, problem: str, content: bytes = b"") -> BadRecord:
    """A :class:`BadRecord` with the size and the excerpt of its ``content``."""
    return BadRecord(position, reason, problem, len(content), excerpt_of(content))


def excerpt_of(content: bytes | bytearray) -> str:
    """The first bytes as text; what is not UTF-8 is shown in hexadecimal."""
    return content[:EXCERPT_BYTES].decode("utf-8", "backslashreplace")


@functools.lru_cache(maxsize=4096)
def is_name(text: str) -> bool:
    """Whether a record's domain or source can serve as a name: printable, on one line, not too long."""
    return 0 < len(text) <= MAX_NAME_CHARACTERS and text.isprintable()


@dataclass(frozen=True)
class Part:
    """A file or a part of one, and what to assume about its documents.

    Attributes:
        source: Index of the source in the settings.
        file: Index of the file in the source's sorted file table.
        url: The source's URL, which says on which file system ``path`` is.
        path: The file, as that file system calls it.
        name: The file, relative to its source.
        format: How documents are stored in it.
        compression: What the file's bytes have to be decompressed with, if anything.
        stored_bytes: The size of the whole file as it was when the work was planned.
        start: First byte (JSON lines) or first row group (Parquet).
        end: One past the last; None for the rest of the file.
        source_name: The source of documents that name none of their own.
        domain: The domain of documents that name none of their own.
        text_key: Where records have their text.
        id_key: Where records have their id.
        encoding: How text files are encoded.
    """

    source: int
    file: int
    url: str
    path: str
    name: str
    format: Format
    compression: Compression | None
    stored_bytes: int
    start: int = 0
    end: int | None = None
    source_name: str = "source"
    domain: str = "text"
    text_key: str = "text"
    id_key: str = "id"
    encoding: str = "utf-8"

    def document(self, position: int, text: str, identity: str | None = None, **metadata: Any) -> Document:
        """A document that knows where it came from.

        ``position`` is the byte offset in the decompressed file (JSON lines), the row (Parquet), the record (WARC), or
        0 (a file that is one document).
        """
        origin = {"source": self.source, "file": self.file, "position": position}
        values = {"domain": self.domain, "source": self.source_name, **metadata, "origin": origin}
        return Document(text=text, id=f"{self.name}/{position}" if identity is None else identity, metadata=values)

    def from_record(self, position: int, values: dict[str, Any], size: int) -> Document | BadRecord:
        """The document in a record of named values: a JSON object or a row; ``size`` is the record's, in bytes.

        A ``domain`` and a ``source`` of the record's own, in its ``metadata`` or beside the text, go before the
        settings'. A text that is empty or null is a document, which cleaning drops under the name ``empty``; a record
        without the key is bad, since then ``text_key`` is likely to be wrong.
        """
        text = values.get(self.text_key, self)
        if text is None:
            text = ""
        if not isinstance(text, str):
            if text is self:
                keys = ", ".join(sorted(map(str, values))[:8])
                return BadRecord(position, "no_text", f"has no {self.text_key!r}; it has: {keys[:EXCERPT_BYTES]}", size)
            return BadRecord(position, "wrong_type", f"{self.text_key!r} is not a string", size)
        given = values.get("metadata")
        names = {}
        for key, default in (("domain", self.domain), ("source", self.source_name)):
            value = (given.get(key) if isinstance(given, dict) else None) or values.get(key) or default
            if not isinstance(value, str) or not is_name(value):
                return BadRecord(position, "wrong_type", f"the {key} is not a short string on one line", size)
            names[key] = value
        identity = values.get(self.id_key)
        if identity is not None and not isinstance(identity, str):
            if not isinstance(identity, int | float):
                return BadRecord(position, "wrong_type", f"{self.id_key!r} is neither a string nor a number", size)
            identity = str(identity)
        return self.document(position, text, identity, **names)
