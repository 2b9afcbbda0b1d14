"""Bad records: put aside with their reasons, counted, and too many only of them end a run.

Of billions of records some are broken, and one of them must not cost a run of days; but a corpus that is broken as a
whole (another key for the text, a copy that was cut off) must not shrink in silence either. So a bad record is written
to ``quarantine/00012.jsonl`` of its piece, with file, position, reason and its first bytes, and when all pieces are
done the *whole* input is judged, source by source (:func:`check_quarantine`), whatever the number of workers. Every
record is accounted for::

    read = quarantined + dropped + kept

Damage after which a part cannot be read on (a truncated file) loses an unknown number of records. It is measured in
files, without the allowance of ``max_bad_records``: of fewer than a thousand files, none may be damaged by default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import orjson

from data_pipeline.config import InputSettings
from data_pipeline.execution.tally import Tally, add_to_tally, read_tallies, tally_sum, write_tally
from data_pipeline.inputs.file_tables import FileTable
from data_pipeline.inputs.parts import BadRecord, Format, Part
from launch.settings import BadInputError

FOLDER = "quarantine"
# A file that is bad throughout shall not be copied into the quarantine; beyond this, records are only counted.
MOST_WRITTEN = 1000
UNITS: dict[Format, str] = {"jsonl": "byte", "parquet": "row", "warc": "record"}


class Quarantine:
    """What one task puts aside; use it as a context, which writes the counts at its end."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / FOLDER / f"{rank:05d}.jsonl"
        self._tallies = folder / "tallies"
        self._rank = rank
        self._file: BinaryIO | None = None
        self._written = 0
        self._reasons: Tally = {}
        self._sources: Tally = {}

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        write_tally(self._tallies / "quarantined", self._rank, self._reasons)
        write_tally(self._tallies / "inputs", self._rank, self._sources)

    def count(self, part: Part, kind: str, number: int) -> None:
        """Count ``number`` records of a part as ``read`` or ``passed_over``, or the ``parts`` themselves."""
        if number:
            add_to_tally(self._sources, f"{part.source}\t{kind}", 0, number)

    def put(self, part: Part, bad: BadRecord) -> None:
        """Put a record aside."""
        add_to_tally(self._reasons, f"{bad.reason}\t{part.domain}\t{part.source}", bad.size)
        add_to_tally(self._sources, f"{part.source}\tbad", bad.size)
        add_to_tally(self._sources, f"{part.source}\tbad {bad.reason}", bad.size)
        if bad.loses_rest:
            add_to_tally(self._sources, f"{part.source}\tdamaged", bad.size)
        if self._written == MOST_WRITTEN:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        record = {
            "source": part.source,
            "file": part.file,
            "position": bad.position,
            "where": where(part, bad),
            "reason": bad.reason,
            "problem": bad.problem,
            "bytes": bad.size,
            "loses_rest": bad.loses_rest,
            "excerpt": bad.excerpt,
        }
        self._file.write(orjson.dumps(record) + b"\n")
        self._written += 1


def where(part: Part, bad: BadRecord) -> str:
    """A bad record's place for people, such as ``part9.jsonl, byte 17``."""
    unit = UNITS.get(part.format)
    return f"{part.name}, {unit} {bad.position}" if unit else part.name


def quarantined(folder: Path) -> Iterator[dict[str, Any]]:
    """What was put aside in a stage's folder, in the order of the input."""
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        with path.open("rb") as file:
            yield from map(orjson.loads, file)


def check_quarantine(folder: Path, tables: Sequence[FileTable], settings: InputSettings) -> None:
    """Judge the whole input when all pieces are done; ``BadInputError`` names the first source that is too bad.

    Args:
        folder: The stage's folder.
        tables: The sources.
        settings: What is allowed.
    """
    tally = read_tallies(folder / "tallies" / "inputs")

    def count(index: int, kind: str) -> int:
        return tally.get(f"{index}\t{kind}", {"documents": 0})["documents"]

    for index, table in enumerate(tables):
        bad, damaged, allowed = count(index, "bad"), count(index, "damaged"), settings.max_bad_fraction
        total, parts = bad + count(index, "read"), count(index, "parts")
        if damaged > allowed * parts:
            what = f"{damaged:,} of {parts:,} files (or parts of files) are damaged"
            limit = f", more than inputs.max_bad_fraction = {allowed} allows"
        elif bad and bad == total:
            what, limit = f"all of its {bad:,} records are bad ({_reasons(tally, index)})", ""
        elif bad > max(settings.max_bad_records, allowed * total):
            what = f"{bad:,} of {total:,} records are bad ({_reasons(tally, index)})"
            limit = (
                f", more than inputs.max_bad_records = {settings.max_bad_records} and inputs.max_bad_fraction = "
                f"{allowed} allow"
            )
        else:
            continue
        of_source = (record for record in quarantined(folder) if record["source"] == index)
        first = next(record for record in of_source if record["loses_rest"] or "damaged" not in what)
        raise BadInputError(
            f"sources.{index} ({table.name}): {what}{limit}; the first: {first['where']}: {first['problem']}; "
            f"correct the source or the settings; more of them in {folder / FOLDER}"
        )


def _reasons(tally: Tally, index: int) -> str:
    prefix = f"{index}\tbad "
    return ", ".join(
        f"{counts['documents']:,} {key.removeprefix(prefix)}"
        for key, counts in sorted(tally.items())
        if key.startswith(prefix)
    )


def describe_quarantine(folder: Path) -> str | None:
    """One line about what was put aside, or None when nothing was."""
    tally = read_tallies(folder / "tallies" / "quarantined")
    count = tally_sum(tally)["documents"]
    if not count:
        return None
    reasons: Counter[str] = Counter()
    for key, counts in tally.items():
        reasons[key.split("\t")[0]] += counts["documents"]
    listed = ", ".join(f"{reason} {number:,}" for reason, number in sorted(reasons.items()))
    return f"{count:,} bad records put aside ({listed}): {folder / FOLDER}"
