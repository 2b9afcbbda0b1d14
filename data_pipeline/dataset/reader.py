"""Reading a prepared data set: the manifest, then each split as one long stream of tokens over its shards.

Needs numpy only. Whatever is wrong with the files ends in a ``BadInputError`` with the file and the remedy.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset.manifest import MANIFEST_NAME, FileEntry, Manifest, SplitEntry
from data_pipeline.dataset.shards import Shard, open_shard
from data_pipeline.split import SPLITS
from data_pipeline.tokenizer.bpe import Tokenizer
from launch.files import path_inside, sha256_of
from launch.settings import BadInputError, parse_settings, read_json_object

PREPARE = "prepare it with: python data_pipeline/main.py --config configs/data/demo.json (or your own configuration)"


class TokenStream:
    """The tokens of one split, shard after shard, as if they were one array of ``total_tokens``."""

    def __init__(self, shards: list[Shard], vocab_size: int) -> None:
        self.shards = shards
        self.vocab_size = vocab_size
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
        return np.concatenate(parts)


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
    def domains(self) -> tuple[str, ...]:
        """Names of the domain ids 0, 1, ..."""
        return self.manifest.domains

    def split(self, name: str) -> TokenStream:
        """The token stream of ``"train"`` or ``"validation"``."""
        return self.streams[name]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        return Tokenizer.load(path_inside(self.folder, self.manifest.tokenizer.file))

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
    except ValueError as error:
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


def _open_split(folder: Path, manifest: Manifest, split: SplitEntry, verify: bool) -> TokenStream:
    shards = []
    for entry in split.shards:
        path = check_file(folder, entry, verify)
        shard = open_shard(path)
        found = (shard.dtype, shard.vocab_size, shard.tokens.size, shard.document_ends.size)
        if found != (manifest.dtype, manifest.vocab_size, entry.tokens, entry.documents):
            raise BadInputError(
                f"{path}: bad header: {found[0]}, vocabulary {found[1]}, {found[2]} tokens, {found[3]} documents "
                "disagree with the manifest; prepare the data set again"
            )
        if int(shard.domain_ids.max()) >= len(manifest.domains):
            raise BadInputError(f"{path}: a domain id is not one of the manifest's; prepare the data set again")
        if verify and int(shard.tokens.max()) >= manifest.vocab_size:
            raise BadInputError(
                f"{path}: a token id is not below vocab_size = {manifest.vocab_size}; prepare the data set again"
            )
        shards.append(shard)
    return TokenStream(shards, manifest.vocab_size)


def open_dataset(path: str | Path, verify: bool = False) -> Dataset:
    """Open a data set; headers, sizes and counts are compared, and with ``verify`` every hash and every token id.

    Raises ``BadInputError`` with one line that names the file and the remedy.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_file(folder, manifest.tokenizer, verify)
    check_file(folder, manifest.validation_documents, verify)
    splits = {"train": manifest.train, "validation": manifest.validation}
    streams = {name: _open_split(folder, manifest, splits[name], verify) for name in SPLITS}
    return Dataset(folder, manifest, streams)
