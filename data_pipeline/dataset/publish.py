"""From finished stages to a data set: files linked into place, the report, and last of all the manifest.

Everything that can fail for want of room happens first, under temporary names, while an older data set is still whole.
Then its manifest goes away, the files get their names, and the new manifest comes. So a reader sees the old data set,
none, or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dataset.manifest import FORMAT_VERSION, MANIFEST_NAME, SHARD_SUFFIXES, Manifest, fingerprint_of
from data_pipeline.dataset.merge import shard_name
from data_pipeline.dataset.reader import check_file, read_manifest
from data_pipeline.dataset.shards import dtype_for, read_description, shard_file
from data_pipeline.disk_full import unwritable
from data_pipeline.inputs.readers import InputFile, read_documents
from data_pipeline.split import SPLITS
from data_pipeline.tokenizer.interface import load_tokenizer
from launch.files import as_json, fsync_path, sha256_of, write_atomically
from launch.settings import BadInputError

VALIDATION_DOCUMENTS_NAME = "validation/documents.jsonl.gz"
SOURCES_NAME = "sources.json"
PAGE_NAME = "report.html"
GZIP_LEVEL = 9

Values = dict[str, Any]


def write_validation_documents(files: Sequence[InputFile], path: Path) -> int:
    """Write the held-out documents as reproducible gzip; returns the size of all their texts under ``gzip -9``."""
    compressor, size = zlib.compressobj(GZIP_LEVEL, wbits=31), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as lines:
        for file in files:
            for document in read_documents(file):
                values = {"id": document.id, "text": document.text, **document.metadata}
                record = {key: values[key] for key in ("id", "text", "domain", "source")}
                lines.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                size += len(compressor.compress(document.text.encode()))
    return size + len(compressor.flush())


def file_entry(path: Path, name: str) -> Values:
    """The manifest's view of one file."""
    return {"file": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _split_entry(paths: Sequence[Path], split: str, domains: Sequence[str]) -> tuple[Values, dict[str, Path]]:
    shards, origins = [], {}
    by_domain = np.zeros((len(domains), 3), dtype=np.int64)
    for index, path in enumerate(paths):
        description = read_description(path)
        by_domain[: len(description.by_domain)] += description.by_domain
        entry = description.entry.model_dump()
        for kind in SHARD_SUFFIXES:
            name = str(shard_file(Path(split) / shard_name(index), kind))
            entry["files"][kind]["file"] = name
            origins[name] = shard_file(path, kind)
        shards.append(entry)

    def totals(row: np.ndarray[Any, Any]) -> Values:
        return dict(zip(("tokens", "documents", "utf8_bytes"), row.tolist(), strict=True))

    values = {
        "shards": shards,
        "total": totals(by_domain.sum(axis=0)),
        "by_domain": {domain: totals(row) for domain, row in zip(domains, by_domain, strict=True) if row[1]},
    }
    return values, origins


def build_manifest(
    name: str,
    shards_folder: Path,
    tokenizer_path: Path,
    domains: Sequence[str],
    settings_hash: str,
    end_token: str | None = None,
    sources_path: Path | None = None,
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest over the shards in ``shards_folder/SPLIT``, and where each of its file names comes from.

    ``sources_path`` is the table of raw files that origins point into.
    """
    tokenizer = load_tokenizer(tokenizer_path, end_token)
    tokenizer_name = f"tokenizer/tokenizer{tokenizer_path.suffix}"
    places = {tokenizer_name: tokenizer_path, VALIDATION_DOCUMENTS_NAME: shards_folder / "documents.jsonl.gz"}
    if sources_path is not None:
        places[SOURCES_NAME] = sources_path
    values: Values = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "dtype": dtype_for(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "end_token_id": tokenizer.end_id,
        "tokenizer": file_entry(tokenizer_path, tokenizer_name),
        "domains": list(domains),
        "settings_hash": settings_hash,
        "sources": file_entry(sources_path, SOURCES_NAME) if sources_path is not None else None,
    }
    for split in SPLITS:
        paths = sorted((shards_folder / split).glob("*.bin"))
        values[split], origins = _split_entry(paths, split, domains)
        places |= origins
    documents = file_entry(places[VALIDATION_DOCUMENTS_NAME], VALIDATION_DOCUMENTS_NAME)
    documents["gzip9_bytes"] = json.loads((shards_folder / "gzip9.json").read_text())
    values["validation_documents"] = documents
    values["fingerprint"] = fingerprint_of(values)
    return Manifest.model_validate(values), places


def is_published(manifest: Manifest, places: Mapping[str, Path], folder: Path) -> bool:
    """Whether ``folder`` holds exactly this data set: links to the files in ``places``, or others of the same hash."""
    try:
        return read_manifest(folder) == manifest and all(
            check_file(folder, entry, verify=not _is_link_to(folder / entry.file, places[entry.file]))
            for entry in manifest.files()
        )
    except BadInputError:
        return False


def _is_link_to(path: Path, place: Path) -> bool:
    return path.is_file() and path.samefile(place)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _bring(source: Path, target: Path) -> None:
    """Link or copy ``source`` to the temporary name of ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, temporary)
        fsync_path(temporary)


def publish(
    manifest: Manifest, places: Mapping[str, Path], report: Values, folder: Path, page: str | None = None
) -> None:
    """Make ``folder`` this data set, with ``report`` as ``report.json`` and ``page`` as ``report.html``.

    Raises ``BadInputError`` when there is no room; ``folder`` is then what it was before.
    """
    targets = {entry.file: folder / entry.file for entry in manifest.files()}
    written = {
        folder / "report.json": as_json(report),
        folder / MANIFEST_NAME: as_json(manifest.model_dump(mode="json")),
    }
    if page is not None:
        written[folder / PAGE_NAME] = page.encode()
    try:
        for name, target in targets.items():
            _bring(places[name], target)
        for target, content in written.items():
            write_atomically(_temporary(target), content)
    except OSError as error:
        for target in (*targets.values(), *written):
            _temporary(target).unlink(missing_ok=True)
        raise unwritable(folder, error) from None
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    fsync_path(folder)
    del written[folder / MANIFEST_NAME]
    for target in (*targets.values(), *written):
        os.replace(_temporary(target), target)
        # Renaming a file to another name of itself (POSIX: two hard links) does nothing and leaves both.
        _temporary(target).unlink(missing_ok=True)
    _remove_old(folder, targets.keys())
    for parent in {target.parent for target in targets.values()}:
        with contextlib.suppress(OSError):
            fsync_path(parent)
    os.replace(_temporary(folder / MANIFEST_NAME), folder / MANIFEST_NAME)
    fsync_path(folder)


def _remove_old(folder: Path, names: Collection[str]) -> None:
    """Remove the files of an earlier data set that this one does not have; nothing else in the folder is touched."""
    for pattern in (*(f"{split}/shard_*" for split in SPLITS), "tokenizer/tokenizer.*", SOURCES_NAME):
        for path in folder.glob(pattern):
            if str(path.relative_to(folder)) not in names:
                path.unlink()
