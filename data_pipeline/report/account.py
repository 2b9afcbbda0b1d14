"""``report.json``: every document and byte accounted for, by domain and by source.

For each domain, and for each source under ``by_source``::

    read = quarantined + dropped (both by reason) + train + validation

A domain is what documents are about, and travels into the data set; a source is an entry of the settings' ``sources``,
which is what a data engineer buys, fetches or leaves out. The numbers are the tallies of finished stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.dedup.decontamination import read_summary
from data_pipeline.execution.stages import Finished
from data_pipeline.execution.tally import Counts, Tally, add_to_tally, tally_by
from data_pipeline.split import SPLITS

NO_SOURCE = "unknown"

SourceAccount = dict[str, Any]
"""``read``, ``train`` and ``validation`` as counts, ``quarantined`` and ``dropped`` as ``{reason: counts}``."""


def make_report(
    cleaned: Finished, removals: Sequence[Finished], split: Finished, shards: Finished, sources: Sequence[str]
) -> dict[str, Any]:
    """The whole account; ``sources`` are the names of the settings' sources, in order."""
    quarantined = cleaned.tally("quarantined")
    read = cleaned.tally("read")
    for key, counts in quarantined.items():
        add_to_tally(read, key.partition("\t")[2], counts["bytes"], counts["documents"])
    dropped: Tally = {}
    decontamination: dict[str, dict[str, int]] = {}
    for stage in (cleaned, *removals):
        decontamination |= read_summary(stage.folder)
        for folder in sorted((stage.folder / "tallies").glob("dropped*")):
            for key, counts in stage.tally(folder.name).items():
                add_to_tally(dropped, key, counts["bytes"], counts["documents"])
    splits = {name: shards.tally(name) for name in SPLITS}
    return {
        "read": tally_by(read, 0),
        "quarantined": by_reason(quarantined),
        "dropped": by_reason(dropped),
        "decontamination": decontamination,
        "kept": tally_by(split.tally("kept"), 0),
        **{name: tally_by(tally, 0) for name, tally in splits.items()},
        "by_source": _by_source(source_labels(sources), read, {"quarantined": quarantined, "dropped": dropped}, splits),
    }


def by_reason(tally: Tally, place: int = 1) -> dict[str, Tally]:
    """A tally of what was dropped as ``{reason: {domain: counts}}``; ``place`` 2 tells sources apart, not domains."""
    reasons: dict[str, Tally] = {}
    for key, counts in tally.items():
        parts = key.split("\t")
        add_to_tally(reasons.setdefault(parts[0], {}), parts[place], counts["bytes"], counts["documents"])
    return reasons


def source_labels(names: Sequence[str]) -> list[str]:
    """Names that tell sources apart: those that several have get the source's number in the settings."""
    return [name if names.count(name) == 1 else f"{name} (sources.{index})" for index, name in enumerate(names)]


def _by_source(
    labels: Sequence[str], read: Tally, losses: Mapping[str, Tally], splits: Mapping[str, Tally]
) -> dict[str, SourceAccount]:
    reasons = {kind: by_reason(tally, place=2) for kind, tally in losses.items()}
    counts = {kind: tally_by(tally, -1) for kind, tally in {"read": read, **splits}.items()}
    return {
        label: {
            **{kind: tally.get(number, _none()) for kind, tally in counts.items()},
            **{
                kind: {reason: tally[number] for reason, tally in sorted(found.items()) if number in tally}
                for kind, found in reasons.items()
            },
        }
        for number, label in _numbered(labels, counts["read"])
    }


def _numbered(labels: Sequence[str], read: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each source's number, as tallies write it, and label; the empty number only where documents have it."""
    yield from ((str(index), label) for index, label in enumerate(labels))
    if "" in read:
        yield "", NO_SOURCE


def _none() -> Counts:
    return {"documents": 0, "bytes": 0}
