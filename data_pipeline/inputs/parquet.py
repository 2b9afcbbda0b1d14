"""Parquet: one row a document, read by row group, and of the columns only those that are needed.

A record's position is its row in the file. A file can be read in ranges of row groups. Text may be in a column of
strings or of bytes (which then have to be UTF-8); ``domain`` and ``source`` columns are used where there are any.

Memory: pyarrow decodes a few hundred rows at a time, of the pages that they are in; a page is what a writer made it,
usually 1 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data_pipeline.inputs.parts import DAMAGED, BadRecord, Found, Part, bad_record
from data_pipeline.inputs.streams import StoredFile, too_large

BATCH_ROWS = 256
# What pyarrow raises for files that are not, or not quite, Parquet.
DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, NotImplementedError)


def row_group_bytes(stored: StoredFile) -> list[int]:
    """Stored bytes of each row group; empty when the file cannot be understood, which reading it will then say."""
    try:
        metadata = pq.ParquetFile(stored).metadata
        groups = (metadata.row_group(index) for index in range(metadata.num_row_groups))
        return [
            sum(group.column(index).total_compressed_size for index in range(group.num_columns)) for group in groups
        ]
    except DAMAGE:
        return []


def read_parquet(part: Part, stored: StoredFile, max_bytes: int) -> Found:
    """The rows of a part."""
    row = 0
    try:
        file = pq.ParquetFile(stored)
        groups = range(part.start, file.num_row_groups if part.end is None else part.end)
        row = sum(file.metadata.row_group(index).num_rows for index in range(part.start))
        names = file.schema_arrow.names
        if part.text_key not in names:
            problem = f"has no column {part.text_key!r}; it has: {', '.join(names[:8])}"
            yield BadRecord(row, "no_text", problem, part.stored_bytes, loses_rest=True)
            return
        wanted = {part.text_key, part.id_key, "domain", "source", "metadata"}
        columns = [name for name in dict.fromkeys(names) if name in wanted]
        for batch in file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=columns):
            for found in _rows(batch, part, row, max_bytes):
                yield found
                row += 1
    except DAMAGE as error:
        problem = f"the Parquet data is damaged: {' '.join(str(error).split())[:300]}"
        yield BadRecord(row, DAMAGED, problem, loses_rest=True)


def _rows(batch: Any, part: Part, row: int, max_bytes: int) -> Iterator[Any]:
    texts = _as_bytes(batch.column(part.text_key))
    others = {name: _values(batch.column(name)) for name in batch.schema.names if name != part.text_key}
    for index in range(batch.num_rows):
        text = texts[index]
        content = text.as_buffer() if text.is_valid and hasattr(text, "as_buffer") else None
        if content is not None and content.size > max_bytes:
            excerpt = content.slice(0, 200).to_pybytes()
            bad = bad_record(row + index, "too_large", too_large(max_bytes), excerpt)
            yield BadRecord(bad.position, bad.reason, bad.problem, content.size, bad.excerpt)
            continue
        values = {name: column[index] for name, column in others.items()}
        size = 0
        try:
            values[part.text_key] = text.as_py() if content is None else str(content, "utf-8")
            size = 0 if content is None else content.size
        except UnicodeDecodeError as error:
            problem = f"{part.text_key!r} is not UTF-8 ({error.reason})"
            yield bad_record(row + index, "invalid_utf8", problem, content.to_pybytes() if content else b"")
            continue
        yield part.from_record(row + index, values, size)


def _as_bytes(column: Any) -> Any:
    """A column of strings as one of bytes, since pyarrow does not check whether they are UTF-8; others as they are."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    return column


def _values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        # Not a name that anything could be called by: from_record refuses each of these rows.
        return [b""] * len(column)
    return values
