"""HTML files: one page a file, its markup decoded and left in; extracting the text is cleaning's work."""

from __future__ import annotations

from data_pipeline.inputs.charset import UndecodableError, decode_html
from data_pipeline.inputs.parts import BadRecord, Found, Part, bad_record
from data_pipeline.inputs.streams import StoredFile, decompressed, whole

HTML = "text/html"


def read_html(part: Part, stored: StoredFile, max_bytes: int) -> Found:
    """The page in a file; its id is the file's name."""
    content = whole(decompressed(stored, part.compression), max_bytes)
    if isinstance(content, BadRecord):
        yield content
        return
    try:
        yield part.document(0, decode_html(content), part.name, media_type=HTML)
    except UndecodableError as error:
        yield bad_record(0, "undecodable", str(error), content)
