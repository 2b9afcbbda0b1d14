"""The work plan: files dealt into pieces of about equal size.

A piece is the unit of work, of completion, and of the files that stages write (``documents/00012.jsonl.zst``). The list
of pieces depends on the inputs and on ``inputs.piece_bytes`` only, never on how many workers there are; read in order,
its documents are those of the sources in order, files by name.

- A giant file that can be read from the middle is cut: plain JSON lines into ranges of bytes, Parquet into ranges of
  row groups. A compressed one is a piece of its own (its middle means nothing without its beginning): whoever makes
  dumps does well to write files of a few hundred MB.
- Small files are taken together, in order, until they are ``piece_bytes``.

Sizes are those after decompression, estimated from the file's name. There are never more than ``MOST_PIECES`` pieces:
for very large corpora ``piece_bytes`` grows accordingly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.config import InputSettings
from data_pipeline.inputs.file_tables import FileTable
from data_pipeline.inputs.formats import EXPANSION
from data_pipeline.inputs.parquet import row_group_bytes
from data_pipeline.inputs.parts import Part
from data_pipeline.inputs.streams import open_part
from launch.files import write_json_atomically

# Of every piece there is a file a stage; beyond this, folders get slow, and five digits short.
MOST_PIECES = 50_000

Piece = tuple[Part, ...]


def plan_pieces(tables: Sequence[FileTable], settings: InputSettings) -> list[Piece]:
    """Deal the files of all sources into pieces."""
    total = sum(_weight(part) for part in _whole_files(tables))
    target = max(settings.piece_bytes, -(-total // MOST_PIECES))
    pieces: list[Piece] = []
    together: list[Part] = []
    gathered = 0
    for part in _whole_files(tables):
        weight = _weight(part)
        if weight >= target:
            if together:
                pieces.append(tuple(together))
                together, gathered = [], 0
            pieces += [(piece,) for piece in _cut(part, weight // target)]
            continue
        together.append(part)
        gathered += weight
        if gathered >= target:
            pieces.append(tuple(together))
            together, gathered = [], 0
    if together:
        pieces.append(tuple(together))
    return pieces


def _whole_files(tables: Sequence[FileTable]) -> Iterator[Part]:
    for index, table in enumerate(tables):
        for position in range(len(table.files)):
            yield table.part(index, position)


def _weight(part: Part) -> int:
    """Bytes of work, at least one."""
    packed = part.compression is not None or part.format == "parquet"
    return max(part.stored_bytes, 1) * (EXPANSION if packed else 1)


def _cut(part: Part, count: int) -> list[Part]:
    """A file in ``count`` parts or fewer."""
    if part.format == "jsonl" and part.compression is None:
        bounds = [part.stored_bytes * index // count for index in range(count + 1)]
    elif part.format == "parquet":
        with open_part(part) as stored:
            bounds = _cut_groups(row_group_bytes(stored), count)
    else:
        bounds = [0]
    if len(bounds) <= 2:
        return [part]
    ends: list[int | None] = [*bounds[1:-1], None]
    return [Part(**{**asdict(part), "start": start, "end": end}) for start, end in zip(bounds, ends, strict=False)]


def _cut_groups(sizes: Sequence[int], count: int) -> list[int]:
    """Bounds that cut row groups of ``sizes`` into runs of about ``sum(sizes) / count``."""
    bounds, gathered = [0], 0
    for index, size in enumerate(sizes):
        gathered += size
        if gathered * count >= sum(sizes) * len(bounds) or index == len(sizes) - 1:
            bounds.append(index + 1)
    return bounds


def write_pieces(pieces: Sequence[Piece], path: Path) -> None:
    """Write the plan for the tasks to read, one piece a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for piece in pieces:
            file.write(orjson.dumps([asdict(part) for part in piece]) + b"\n")


def read_piece(path: Path, number: int) -> Piece:
    """One piece of a plan that :func:`write_pieces` wrote."""
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if index == number:
                return tuple(Part(**values) for values in orjson.loads(line))
    raise IndexError(f"{path}: has no piece {number}")


def write_file_tables(tables: Sequence[FileTable], path: Path) -> None:
    """Write which file an origin's numbers stand for, and what was left out."""
    content: list[dict[str, Any]] = [
        {
            "source": table.name,
            "path": table.source.path,
            "files": [file.name for file in table.files],
            "bytes": [file.stored_bytes for file in table.files],
            "digests": [file.digest for file in table.files],
            "left_out": table.left_out,
        }
        for table in tables
    ]
    write_json_atomically(path, content)
