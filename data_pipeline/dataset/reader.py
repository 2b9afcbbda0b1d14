"""Reading a prepared data set: the manifest, then each split as one long stream of tokens over its shards.

Needs numpy only. Whatever is wrong with the files ends in a ``BadInputError`` with the file and the remedy. Opening
compares names, sizes, headers and counts, at a cost that grows with the number of shards only; ``verify=True`` reads
every byte.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import MANIFEST_NAME, FileEntry, Manifest, SplitEntry
from data_pipeline.dataset.shards import UNKNOWN_SOURCE, Shard, check_shard, open_shard
from data_pipeline.split import SPLITS
from data_pipeline.tokenizer.interface import Tokenizer, load_tokenizer
from launch.files import path_inside, sha256_of
from launch.settings import BadInputError, parse_settings, read_json_object

PREPARE = "prepare it with: python data_pipeline/main.py --config configs/data/demo.json (or your own configuration)"
FILES_PER_SHARD = 3
SPARE_FILES = 256


class TokenStream:
    """The tokens of one split, shard after shard, as if they were one array of ``total_tokens``."""

    def __init__(self, shards: list[Shard], vocab_size: int, domains: int = 2**16) -> None:
        self.shards = shards
        self.vocab_size = vocab_size
        self._domains = domains
        self._starts = np.concatenate([[0], np.cumsum([shard.tokens.size for shard in shards], dtype=np.int64)])
        self.total_tokens = int(self._starts[-1])

    def _pieces(self, start: int, count: int) -> Iterator[tuple[Shard, int, int]]:
        if start < 0 or count < 0 or start + count > self.total_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.total_tokens}")
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while count:
            inside = start - int(self._starts[index])
            taken = min(count, self.shards[index].tokens.size - inside)
            yield self.shards[index], inside, inside + taken
            start, count, index = start + taken, count - taken, index + 1

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens ``[start, start + count)`` as int64. Raises ``BadInputError`` for an id outside the vocabulary."""
        result = np.empty(count, dtype=np.int64)
        filled = 0
        for shard, begin, end in self._pieces(start, count):
            result[filled : filled + end - begin] = shard.tokens[begin:end]
            if end > begin and int(result[filled : filled + end - begin].max()) >= self.vocab_size:
                raise BadInputError(
                    f"{shard.path}: a token id between {begin} and {end} is not below vocab_size = {self.vocab_size}: "
                    "the shard is damaged; prepare the data set again"
                )
            filled += end - begin
        return result

    def domain_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """For each token of ``[start, start + count)`` the domain of its document, an index into ``domains``."""
        parts = [np.empty(0, dtype=np.int64)]
        for shard, begin, end in self._pieces(start, count):
            document = np.searchsorted(shard.document_ends, np.arange(begin, end, dtype=np.uint64), side="right")
            parts.append(shard.domain_ids[document].astype(np.int64))
            if end > begin and int(parts[-1].max()) >= self._domains:
                raise BadInputError(
                    f"{shard.path}: a domain id of its documents is not one of the manifest's: the shard is damaged; "
                    "prepare the data set again"
                )
        return np.concatenate(parts)


@dataclass(frozen=True)
class Provenance:
    """Where a document came from: its source's name, the file there, and the position in that file.

    The position is a byte offset in the decompressed stream for JSON lines, a row number for Parquet, a record number
    for WARC, and 0 for a file that is one document.
    """

    source: str
    file: str
    position: int


@dataclass(frozen=True)
class Dataset:
    """A prepared data set: open it with :func:`open_dataset`."""

    folder: Path
    manifest: Manifest
    streams: dict[str, TokenStream]

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens, whatever the files are called."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """Token ids lie in ``[0, vocab_size)``."""
        return self.manifest.vocab_size

    @property
    def end_token_id(self) -> int:
        """The id that ends every document."""
        return self.manifest.end_token_id

    @property
    def tokenizer_sha256(self) -> str:
        """Of the tokenizer's file: data sets with the same one may be mixed."""
        return self.manifest.tokenizer.sha256

    @property
    def tokenizer_suffix(self) -> str:
        """Of the tokenizer's file: what kind it is."""
        return Path(self.manifest.tokenizer.file).suffix

    @property
    def tokenizer_bytes(self) -> bytes:
        """The tokenizer's file."""
        return (self.folder / self.manifest.tokenizer.file).read_bytes()

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domain ids 0, 1, ..."""
        return self.manifest.domains

    def split(self, name: str) -> TokenStream:
        """The token stream of ``"train"`` or ``"validation"``."""
        return self.streams[name]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens. Raises ``BadInputError`` when the file is another one."""
        path = check_file(self.folder, self.manifest.tokenizer, verify=True)
        tokenizer = load_tokenizer(path, self.manifest.end_token_id)
        if tokenizer.vocab_size != self.vocab_size:
            raise BadInputError(
                f"{path}: has {tokenizer.vocab_size} tokens, the manifest says {self.vocab_size}; "
                "prepare the data set again"
            )
        return tokenizer

    @cached_property
    def source_files(self) -> list[dict[str, Any]] | None:
        """The table that origins point into, ``[{"source": name, "files": [name, ...]}, ...]``; None when not kept."""
        if self.manifest.sources is None:
            return None
        path = check_file(self.folder, self.manifest.sources, verify=True)
        table: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return table

    def provenance(self, shard: Shard, document: int) -> Provenance | None:
        """Where a document was read; None when that is not known."""
        source, file, position = shard.origins[document].item()
        if self.source_files is None or source == UNKNOWN_SOURCE:
            return None
        try:
            entry = self.source_files[source]
            return Provenance(str(entry["source"]), str(entry["files"][file]), position)
        except (IndexError, KeyError, TypeError):
            raise BadInputError(
                f"{shard.path}: document {document} is from file {file} of source {source}, which is not in the table "
                "of sources; prepare the data set again"
            ) from None

    def validation_documents(self) -> Iterator[dict[str, Any]]:
        """The held-out documents in stream order: ``id``, ``text``, ``domain``, ``source``."""
        path = path_inside(self.folder, self.manifest.validation_documents.file)
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``. Raises ``BadInputError`` when folder or manifest is missing or wrong."""
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise BadInputError(f"{folder}: no such folder, so no data set; {PREPARE}")
    if not path.is_file():
        raise BadInputError(f"{folder}: has no {MANIFEST_NAME}: not a data set, or one not finished; {PREPARE}")
    return parse_settings(Manifest, read_json_object(path), source=str(path))


def check_file(folder: Path, entry: FileEntry, verify: bool) -> Path:
    """The path of a manifest's file, after comparing its size and, with ``verify``, its hash."""
    try:
        path = path_inside(folder, entry.file)
    except (ValueError, OSError) as error:
        raise BadInputError(f"{folder / MANIFEST_NAME}: {error}; prepare the data set again") from None
    if not path.is_file():
        raise BadInputError(f"{path}: named by the manifest but missing; prepare the data set again")
    size = path.stat().st_size
    if size != entry.bytes:
        problem = "truncated" if size < entry.bytes else "wrong size"
        raise BadInputError(f"{path}: {problem}: {size} bytes, the manifest says {entry.bytes}; prepare it again")
    if verify and sha256_of(path) != entry.sha256:
        raise BadInputError(f"{path}: wrong sha256: not the file the manifest describes; prepare the data set again")
    return path


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    """Every file of the manifest, several at a time; the first wrong one in its order is the one that is named."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for checked in [pool.submit(check_file, folder, entry, verify) for entry in manifest.files()]:
            checked.result()


def _allow_open_files(shards: int) -> None:
    """A mapped file keeps its descriptor, so many shards need a higher limit than the usual 1,024."""
    needed = FILES_PER_SHARD * shards + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadInputError(
            f"{shards} shards need {needed} open files, this machine allows {hard}; "
            "raise the limit (ulimit -Hn), or prepare the data set with a larger shards.max_tokens"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _open_split(folder: Path, manifest: Manifest, split: SplitEntry, verify: bool) -> TokenStream:
    shards = []
    for entry in split.shards:
        shard = open_shard(path_inside(folder, entry.files.tokens.file))
        found = (shard.dtype, shard.tokens.size, shard.document_ends.size)
        if found != (manifest.dtype, entry.tokens, entry.documents):
            raise BadInputError(
                f"{shard.path}: {found[0]}, {found[1]} tokens, {found[2]} documents disagree with the manifest; "
                "prepare the data set again"
            )
        if verify:
            check_shard(shard, manifest.vocab_size, len(manifest.domains))
        shards.append(shard)
    return TokenStream(shards, manifest.vocab_size, len(manifest.domains))


def open_dataset(path: str | Path, verify: bool = False) -> Dataset:
    """Open a data set; headers, sizes and counts are compared, and with ``verify`` every hash and every token id.

    Raises ``BadInputError`` with one line that names the file and the remedy.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    _check_files(folder, manifest, verify)
    _allow_open_files(len(manifest.train.shards) + len(manifest.validation.shards))
    splits = manifest.splits()
    streams = {name: _open_split(folder, manifest, splits[name], verify) for name in SPLITS}
    return Dataset(folder, manifest, streams)
