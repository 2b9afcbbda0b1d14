"""The manifest: what a prepared data set consists of, and its fingerprint. A data set exists when its manifest does.

Readers open the files that it lists, by the names that it gives, and no others.

The fingerprint is a SHA-256 over what decides which tokens a sample holds: the type, the vocabulary, the tokenizer, the
domains and the hashes of each shard's tokens, boundaries and records, in order. File names, settings and totals are not
part of it. A run's samples are a pure function of (seed, fingerprint, index), so a checkpoint remembers the fingerprint
and refuses another data set.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from launch.settings import SettingError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SHARD_SUFFIXES = {
    "tokens": ".bin",
    "document_ends": ".bin.index",
    "documents": ".documents",
    "megatron_index": ".idx",
}
"""The files of a shard; all have the name of their ``.bin`` in front."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inner_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ValueError("must be a relative path inside the data set's folder")
    return name


FileName = Annotated[str, AfterValidator(_inner_name)]


class Entry(BaseModel):
    """A part of the manifest: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(Entry):
    """A file by its name inside the folder, its size and its hash."""

    file: FileName
    bytes: Count
    sha256: Sha256


class ShardFiles(Entry):
    """The files of one shard."""

    tokens: FileEntry
    document_ends: FileEntry
    documents: FileEntry
    megatron_index: FileEntry

    @model_validator(mode="after")
    def _share_a_name(self) -> ShardFiles:
        stem = self.tokens.file.removesuffix(".bin")
        for kind, suffix in SHARD_SUFFIXES.items():
            name = getattr(self, kind).file
            if name != stem + suffix:
                raise SettingError(f"{kind}.file", name, f"must be {stem + suffix!r}")
        return self

    def all(self) -> tuple[FileEntry, ...]:
        """The four entries, tokens first."""
        return (self.tokens, self.document_ends, self.documents, self.megatron_index)


class Totals(Entry):
    """Counts of a shard, a split or a domain of it; tokens include the end tokens."""

    tokens: Count
    documents: Count
    utf8_bytes: Count


class ShardEntry(Totals):
    """One shard: its files and what is in them."""

    files: ShardFiles


class SplitEntry(Entry):
    """One split: its shards, whose order is the order of the token stream, and its totals."""

    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    total: Totals
    by_domain: dict[str, Totals]


class ValidationDocuments(FileEntry):
    """The held-out texts in stream order, and what ``gzip -9`` makes of them all: a yardstick for bits-per-byte."""

    gzip9_bytes: Count


class Manifest(Entry):
    """Everything a reader needs to know before it opens a shard.

    ``sources`` is the table of raw files that documents' origins point into; none when it was not kept.
    """

    format_version: Literal[2]
    name: str
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1, le=2**31)
    end_token_id: Count
    tokenizer: FileEntry
    domains: tuple[str, ...] = Field(min_length=1, max_length=2**16)
    settings_hash: Sha256
    sources: FileEntry | None
    train: SplitEntry
    validation: SplitEntry
    validation_documents: ValidationDocuments
    fingerprint: Sha256

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        if self.end_token_id >= self.vocab_size:
            raise SettingError("end_token_id", self.end_token_id, f"is not below vocab_size = {self.vocab_size}")
        if self.vocab_size > 2**16 and self.dtype == "uint16":
            raise SettingError("vocab_size", self.vocab_size, "does not fit dtype = uint16")
        if self.fingerprint != fingerprint_of(self.model_dump()):
            raise SettingError("fingerprint", self.fingerprint, "not this content's; prepare the data set again")
        return self

    def splits(self) -> dict[str, SplitEntry]:
        """Both splits by name."""
        return {"train": self.train, "validation": self.validation}

    def files(self) -> list[FileEntry]:
        """Every file of the data set beside the manifest."""
        single = [self.tokenizer, self.validation_documents, *([self.sources] if self.sources else [])]
        shards = [*self.train.shards, *self.validation.shards]
        return single + [entry for shard in shards for entry in shard.files.all()]


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """The fingerprint of a manifest given as plain values (its own ``fingerprint`` is not looked at)."""

    def identity(shard: dict[str, Any]) -> list[Any]:
        files = shard["files"]
        return [shard["tokens"], *(files[kind]["sha256"] for kind in ("tokens", "document_ends", "documents"))]

    content = {
        "format_version": manifest["format_version"],
        "dtype": manifest["dtype"],
        "vocab_size": manifest["vocab_size"],
        "end_token_id": manifest["end_token_id"],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "domains": list(manifest["domains"]),
        **{split: [identity(shard) for shard in manifest[split]["shards"]] for split in ("train", "validation")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
