"""Documents of a data set for people: decoded, with their domain and where they came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_pipeline.dataset.reader import Dataset, Provenance
from data_pipeline.dataset.shards import Shard
from launch.settings import BadInputError

SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class FoundDocument:
    """One document: its number in the split, its text without the end token, and what is known about it."""

    split: str
    number: int
    shard: str
    text: str
    tokens: int
    utf8_bytes: int
    domain: str
    provenance: Provenance | None


def documents(
    dataset: Dataset, split: str, domain: str | None = None, search: str | None = None
) -> Iterator[FoundDocument]:
    """The documents of a split in order, those of one ``domain`` or those whose text contains ``search``."""
    domain_id = _domain_id(dataset, domain)
    first = 0
    for shard in dataset.split(split).shards:
        count = shard.document_ends.size
        chosen = np.arange(count) if domain_id is None else np.flatnonzero(shard.domain_ids == domain_id)
        for index in chosen.tolist():
            found = _document(dataset, split, shard, index, first + index)
            if search is None or search in found.text:
                yield found
        first += count


def document(dataset: Dataset, split: str, number: int) -> FoundDocument:
    """Document ``number`` of a split, counted from 0 over its shards. Raises ``BadInputError`` when there is none."""
    first = 0
    for shard in dataset.split(split).shards:
        if 0 <= number - first < shard.document_ends.size:
            return _document(dataset, split, shard, number - first, number)
        first += shard.document_ends.size
    raise BadInputError(f"--document {number}: {split} has documents 0 to {first - 1}")


def _domain_id(dataset: Dataset, domain: str | None) -> int | None:
    if domain is None:
        return None
    if domain not in dataset.domains:
        raise BadInputError(f"--domain {domain}: is not in this data set; there are: {', '.join(dataset.domains)}")
    return dataset.domains.index(domain)


def _document(dataset: Dataset, split: str, shard: Shard, index: int, number: int) -> FoundDocument:
    ids = shard.document(index)
    return FoundDocument(
        split=split,
        number=number,
        shard=f"{shard.path.name} {index}",
        text=dataset.tokenizer.decode(ids[:-1].tolist()),
        tokens=ids.size,
        utf8_bytes=int(shard.utf8_bytes[index]),
        domain=dataset.domains[int(shard.domain_ids[index])],
        provenance=dataset.provenance(shard, index),
    )


def print_document(console: Console, found: FoundDocument, mark: str | None = None) -> None:
    """One document in a frame, cut to a screenful around the first ``mark``."""
    where = "unknown: this data set was prepared without a table of sources"
    if found.provenance is not None:
        where = f"{found.provenance.source}: {found.provenance.file} at {found.provenance.position:,}"
    at = max(found.text.find(mark) - SHOWN_CHARACTERS // 2, 0) if mark else 0
    shown = found.text[at : at + SHOWN_CHARACTERS]
    text = Text(f"{'... ' if at else ''}{shown}{' ...' if at + len(shown) < len(found.text) else ''}")
    if mark:
        text.highlight_words([mark], style="reverse")
    title = (
        f"{found.split} {found.number} ({found.shard}), {found.domain}, {found.tokens:,} tokens, "
        f"{found.utf8_bytes:,} bytes"
    )
    console.print(Panel(text, title=Text(title), subtitle=Text(where), title_align="left", subtitle_align="left"))


def print_summary(console: Console, dataset: Dataset) -> None:
    """What the data set holds, by split and domain, and its files."""
    manifest = dataset.manifest
    content = Table(title=f"{manifest.name}: {dataset.folder}", title_justify="left")
    for name in ("split", "domain", "documents", "tokens", "MB of text", "bytes a token"):
        content.add_column(name, justify="left" if name in ("split", "domain") else "right")
    for split, entry in manifest.splits().items():
        rows = [*sorted(entry.by_domain.items()), ("all", entry.total)]
        for domain, totals in rows:
            content.add_row(
                split,
                Text(domain),
                f"{totals.documents:,}",
                f"{totals.tokens:,}",
                f"{totals.utf8_bytes / 1e6:,.2f}",
                f"{totals.utf8_bytes / totals.tokens:.2f}",
                end_section=domain == "all",
            )
    console.print(content)
    facts = Table(show_header=False)
    shards = {split: len(entry.shards) for split, entry in manifest.splits().items()}
    size = sum(entry.bytes for entry in manifest.files())
    provenance = "not kept"
    if dataset.source_files is not None:
        files = sum(len(source["files"]) for source in dataset.source_files)
        provenance = f"{files:,} files of {len(dataset.source_files)} sources"
    for key, value in (
        ("shards", ", ".join(f"{count} {split}" for split, count in shards.items())),
        ("size", f"{size / 1e6:,.2f} MB in {len(manifest.files())} files"),
        ("token type", manifest.dtype),
        ("vocabulary", f"{manifest.vocab_size:,}, end token {manifest.end_token_id}"),
        ("tokenizer", f"{manifest.tokenizer.file} {manifest.tokenizer.sha256[:16]}"),
        ("provenance", provenance),
        ("settings", manifest.settings_hash[:16]),
        ("fingerprint", manifest.fingerprint[:16]),
    ):
        facts.add_row(key, Text(value))
    console.print(facts)
