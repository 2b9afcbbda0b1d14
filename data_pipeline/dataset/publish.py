"""From finished stages to a data set: files linked into place, the report, and last of all the manifest.

While files change there is no manifest, so a reader sees the old data set, none, or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dataset.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    ShardEntry,
    fingerprint_of,
)
from data_pipeline.dataset.reader import check_file, read_manifest
from data_pipeline.dataset.shards import open_shard
from data_pipeline.inputs.readers import InputFile, read_documents
from data_pipeline.split import SPLITS
from data_pipeline.tokenizer.bpe import Tokenizer
from launch.files import fsync_path, sha256_of, write_json_atomically
from launch.settings import BadInputError

TOKENIZER_NAME = "tokenizer/tokenizer.model"
VALIDATION_DOCUMENTS_NAME = "validation/documents.jsonl.gz"
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


def _split_entry(paths: Sequence[Path], split: str, domains: Sequence[str]) -> Values:
    shards, by_domain = [], np.zeros((len(domains), 3), dtype=np.int64)
    for index, path in enumerate(paths):
        shard = open_shard(path)
        lengths = np.diff(shard.document_ends, prepend=np.uint64(0))
        per_document = np.stack([lengths, np.ones_like(lengths), shard.utf8_bytes], axis=1).astype(np.int64)
        np.add.at(by_domain, shard.domain_ids, per_document)
        entry = file_entry(path, f"{split}/shard_{index:05d}.tokens")
        entry |= zip(("tokens", "documents", "utf8_bytes"), per_document.sum(axis=0).tolist(), strict=True)
        shards.append(entry)

    def totals(row: np.ndarray[Any, Any]) -> Values:
        return dict(zip(("tokens", "documents", "utf8_bytes"), row.tolist(), strict=True))

    return {
        "shards": shards,
        "total": totals(by_domain.sum(axis=0)),
        "by_domain": {domain: totals(row) for domain, row in zip(domains, by_domain, strict=True) if row[1]},
    }


def build_manifest(
    name: str, shards_folder: Path, tokenizer_path: Path, domains: Sequence[str], settings_hash: str
) -> tuple[Manifest, dict[str, Path]]:
    """The manifest over the shards stage's files, and where each of its file names comes from."""
    tokenizer = Tokenizer.load(tokenizer_path)
    sources = {TOKENIZER_NAME: tokenizer_path, VALIDATION_DOCUMENTS_NAME: shards_folder / "documents.jsonl.gz"}
    values: Values = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "vocab_size": tokenizer.vocab_size,
        "end_token_id": tokenizer.end_id,
        "tokenizer": file_entry(tokenizer_path, TOKENIZER_NAME),
        "domains": list(domains),
        "settings_hash": settings_hash,
    }
    for split in SPLITS:
        paths = sorted((shards_folder / split).glob("*.tokens"))
        values["dtype"] = open_shard(paths[0]).dtype
        values[split] = _split_entry(paths, split, domains)
        sources |= zip((shard["file"] for shard in values[split]["shards"]), paths, strict=True)
    documents = file_entry(sources[VALIDATION_DOCUMENTS_NAME], VALIDATION_DOCUMENTS_NAME)
    documents["gzip9_bytes"] = json.loads((shards_folder / "gzip9.json").read_text())
    values["validation_documents"] = documents
    values["fingerprint"] = fingerprint_of(values)
    return Manifest.model_validate(values), sources


def _entries(manifest: Manifest) -> list[FileEntry]:
    shards: Iterable[ShardEntry] = (*manifest.train.shards, *manifest.validation.shards)
    return [manifest.tokenizer, manifest.validation_documents, *shards]


def is_published(manifest: Manifest, folder: Path) -> bool:
    """Whether ``folder`` holds exactly this data set, by sizes."""
    try:
        return read_manifest(folder) == manifest and all(
            check_file(folder, entry, verify=False) for entry in _entries(manifest)
        )
    except BadInputError:
        return False


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, temporary)
        fsync_path(temporary)
    os.replace(temporary, target)


def publish(manifest: Manifest, sources: dict[str, Path], report: Values, folder: Path) -> None:
    """Make ``folder`` this data set: manifest away, files in place, foreign shards out, report, manifest back."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    fsync_path(folder)
    for entry in _entries(manifest):
        _place(sources[entry.file], folder / entry.file)
    for split in SPLITS:
        for path in (folder / split).glob("shard_*.tokens"):
            if f"{split}/{path.name}" not in sources:
                path.unlink()
    for parent in {(folder / entry.file).parent for entry in _entries(manifest)}:
        with contextlib.suppress(OSError):
            fsync_path(parent)
    write_json_atomically(folder / "report.json", report)
    write_json_atomically(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))
