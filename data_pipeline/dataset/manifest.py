"""The manifest: what a prepared data set consists of, and its fingerprint. A data set exists when its manifest does.

The fingerprint is a SHA-256 over what decides which tokens a sample holds: the type, the vocabulary, the tokenizer, the
domains and each shard's hash, in order. File names, settings and totals are not part of it. A run's samples are a pure
function of (seed, fingerprint, index), so a checkpoint remembers the fingerprint and refuses another data set.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _inner_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
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


class ShardEntry(FileEntry):
    """One shard, with what its header and index say."""

    tokens: Count
    documents: Count
    utf8_bytes: Count


class Totals(Entry):
    """Sums over a split or over one domain of it; tokens include the end tokens."""

    tokens: Count
    documents: Count
    utf8_bytes: Count


class SplitEntry(Entry):
    """One split: its shards, whose order is the order of the token stream, and its totals."""

    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    total: Totals
    by_domain: dict[str, Totals]


class ValidationDocuments(FileEntry):
    """The held-out texts in stream order, and what ``gzip -9`` makes of them all: a yardstick for bits-per-byte."""

    gzip9_bytes: Count


class Manifest(Entry):
    """Everything a reader needs to know before it opens a shard."""

    format_version: Literal[1]
    name: str
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1)
    end_token_id: Count
    tokenizer: FileEntry
    domains: tuple[str, ...] = Field(min_length=1)
    settings_hash: Sha256
    train: SplitEntry
    validation: SplitEntry
    validation_documents: ValidationDocuments
    fingerprint: Sha256

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        if self.end_token_id >= self.vocab_size:
            raise ValueError(f"end_token_id = {self.end_token_id}: is not below vocab_size = {self.vocab_size}")
        if self.fingerprint != fingerprint_of(self.model_dump()):
            raise ValueError(f"fingerprint = {self.fingerprint}: not this content's; prepare the data set again")
        return self


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """The fingerprint of a manifest given as plain values (its own ``fingerprint`` is not looked at)."""
    content = {
        "format_version": manifest["format_version"],
        "dtype": manifest["dtype"],
        "vocab_size": manifest["vocab_size"],
        "end_token_id": manifest["end_token_id"],
        "tokenizer": manifest["tokenizer"]["sha256"],
        "domains": list(manifest["domains"]),
        **{
            split: [[shard["tokens"], shard["sha256"]] for shard in manifest[split]["shards"]]
            for split in ("train", "validation")
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
