"""Which characters a web page's bytes are: what its sender says, checked against the bytes.

The order is that of the HTML standard (WHATWG, "determining the character encoding"): a byte order mark, the HTTP
header, a ``<meta>`` in the first 1,024 bytes. As browsers do, ``iso-8859-1`` and ``ascii`` are taken for the
``windows-1252`` that they nearly always are, and likewise for other encodings with a common superset. Where nothing is
declared, or the declared encoding does not fit, UTF-8 is tried, which hardly any other text happens to be; then the
declared encoding with a few replacement characters; and last what a statistical detector says.

Only encodings of the web are looked up: Python has codecs of other kinds, which a page could name.
"""

from __future__ import annotations

import codecs
import contextlib
import re

UNDECODABLE_FRACTION = 0.01
META_BYTES = 1024

_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Python's name of what is declared: what browsers decode with.
_SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "utf-16": "utf-16-le",
}
_WEB = frozenset(
    {"utf-8", "utf-16-le", "utf-16-be", "koi8-r", "koi8-u", "mac-roman", "mac-cyrillic", "cp866", "cp874"}
    | {"gb18030", "big5hkscs", "euc_jp", "iso2022_jp", "cp932", "cp949"}
    | {f"cp{number}" for number in range(1250, 1259)}
    | {f"iso8859-{number}" for number in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)}
)


def byte_order_mark(content: bytes) -> tuple[bytes, str | None]:
    """The mark that ``content`` begins with and the encoding it stands for, or ``(b"", None)``."""
    return next((pair for pair in _MARKS if content.startswith(pair[0])), (b"", None))


class UndecodableError(Exception):
    """The bytes are no text in any encoding that could be meant; the message says why."""


def web_encoding(label: str | None) -> str | None:
    """Python's name for a declared encoding, or None when nothing, or nothing of the web, is declared."""
    try:
        name = codecs.lookup((label or "").strip().strip("\"'")).name
    except (LookupError, ValueError, UnicodeError):
        return None
    name = _SUPERSETS.get(name, name)
    return name if name in _WEB else None


def decode_html(content: bytes, header: str | None = None) -> str:
    """The characters of a page; ``header`` is the charset that came with it. Raises :class:`UndecodableError`."""
    mark, marked = byte_order_mark(content)
    if marked:
        return _replaced(content[len(mark) :], marked)
    declared = web_encoding(header)
    if declared is None and (meta := _META.search(content[:META_BYTES])):
        declared = web_encoding(meta[1].decode())
        if declared and declared.startswith("utf-16"):  # a page whose ASCII could be read is not that
            declared = "utf-8"
    for encoding in dict.fromkeys((declared or "utf-8", "utf-8")):
        try:
            return _checked(content.decode(encoding))
        except UnicodeDecodeError:
            continue
    if declared:
        with contextlib.suppress(UndecodableError):
            return _replaced(content, declared)
    return _replaced(content, _detected(content) or "cp1252")


def _detected(content: bytes) -> str | None:
    import cchardet  # type: ignore[import-not-found]

    return web_encoding(cchardet.detect(content)["encoding"])


def _replaced(content: bytes, encoding: str) -> str:
    text = content.decode(encoding, "replace")
    if text.count("\ufffd") > UNDECODABLE_FRACTION * len(text):
        raise UndecodableError(f"is not text in {encoding}, nor in any other encoding")
    return _checked(text)


def _checked(text: str) -> str:
    if "\0" in text:
        raise UndecodableError("has NUL characters, so it is no text")
    return text
