"""What a data set has, kept so that later ones can leave it out: keys of texts, MinHash buckets and passages.

    INDEX/manifest.json                               written last
    INDEX/exact/bucket_000/00000.exact.index          16 bytes a text
    INDEX/minhash/bucket_000/00000.minhash.index ...  8 bytes a number of the signature (datatrove's format)
    INDEX/sentences/bucket_000/00000.sentences.index  8 bytes a passage

Keys are sorted and each is there once; those that an index named in ``dedup.against`` has are not repeated, so a third
dump names both. Keys of documents that were removed as copies are in it too: preparing B against the index of A removes
from B exactly what preparing A and B together would.

Keys mean something only under the settings they were made with, so the manifest records those, and a *probe*: the key
of a fixed text, which changes when the words, the normal form or the hash functions of this program do. An index made
otherwise is refused, by the name of the setting.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from data_pipeline.config import DedupSettings
from data_pipeline.dedup.exact import exact_digest
from data_pipeline.dedup.minhash import hasher_of
from data_pipeline.dedup.sentences import span_keys
from data_pipeline.section import Section
from launch.files import fsync_path, path_inside, sha256_of, write_json_atomically
from launch.settings import BadInputError, read_json_object

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
PROBE = (
    "An index's probe: Ça coûte 1,234.5 € — “naïve” co-operation, don't you think?\n"
    "第二句用来检查词的划分。 Третье предложение, e-mail: a_b@c.example! ½ x² ﬁn ΟΔΟΣ.\n"
    "Ein letzter Satz mit Größe, ١٢٣ und e\u0301."
)


class IndexFile(Section):
    """One file of keys."""

    bytes: int = Field(ge=0)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class IndexManifest(Section):
    """What an index holds: for each kind of key the settings it was made with, and all files."""

    format_version: Literal[1]
    name: str
    kinds: dict[str, dict[str, int | str]]
    files: dict[str, IndexFile]


@dataclass(frozen=True)
class OpenedIndex:
    """An index whose settings agree with those of this preparation."""

    folder: Path
    setting: str
    fingerprint: str
    manifest: IndexManifest

    def keys_of(self, kind: str) -> Path:
        """The folder of one kind's keys, after checking every file of it. Raises ``BadInputError``."""
        for name, entry in self.manifest.files.items():
            if name.split("/")[0] == kind:
                path = _inside(self.folder, name, self.setting)
                if not path.is_file() or path.stat().st_size != entry.bytes or sha256_of(path) != entry.sha256:
                    raise BadInputError(f"{self.setting}: {path} is missing or damaged; make the index again")
        listed = {name for name in self.manifest.files if name.split("/")[0] == kind}
        present = {str(path.relative_to(self.folder)) for path in (self.folder / kind).rglob("*") if path.is_file()}
        if present - listed:
            raise BadInputError(
                f"{self.setting}: {self.folder / min(present - listed)} is not in the index's manifest; remove it"
            )
        return self.folder / kind


def settings_of_kinds(settings: DedupSettings) -> dict[str, dict[str, int | str]]:
    """For each kind of key that these settings make: what has to agree for keys to be comparable."""
    kinds: dict[str, dict[str, int | str]] = {}
    if settings.exact:
        kinds["exact"] = {
            "exact_text": settings.exact_text,
            "probe": exact_digest(PROBE, settings.exact_text).hex(),
        }
    if settings.minhash:
        hasher = hasher_of(settings)
        shingles = hasher.shingles(" ".join([PROBE] * settings.ngram))
        kinds["minhash"] = {
            name: getattr(settings, name) for name in ("ngram", "buckets", "hashes_per_bucket", "seed")
        } | {"probe": hashlib.sha256(hasher.signature(shingles).tobytes()).hexdigest()}
    if settings.sentences:
        spans = span_keys(" ".join([PROBE] * settings.sentence_span), settings.sentence_span, min_words=1)
        kinds["sentences"] = {name: getattr(settings, name) for name in ("sentence_span", "min_span_words")} | {
            "probe": hashlib.sha256(repr(spans).encode()).hexdigest()
        }
    return kinds


def open_indices(settings: DedupSettings) -> list[OpenedIndex]:
    """The indices of ``dedup.against``, in order. Raises ``BadInputError`` for one that cannot be compared with."""
    wanted = settings_of_kinds(settings)
    return [
        _open_index(Path(path), f"dedup.against.{position} = {path!r}", wanted)
        for position, path in enumerate(settings.against)
    ]


def _read_manifest(folder: Path, setting: str) -> IndexManifest:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise BadInputError(f"{setting}: holds no index; name a folder that a preparation wrote as its dedup.index")
    try:
        return IndexManifest.model_validate(read_json_object(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInputError(f"{path}: {key}: {first['msg']}; make the index again") from None


def _open_index(folder: Path, setting: str, wanted: Mapping[str, Mapping[str, int | str]]) -> OpenedIndex:
    manifest = _read_manifest(folder, setting)
    for kind, values in wanted.items():
        made = manifest.kinds.get(kind)
        if made is None:
            raise BadInputError(
                f"{setting}: has no keys of kind {kind!r} (it has {', '.join(sorted(manifest.kinds)) or 'none'}); "
                f"set dedup.{kind} = false, or make the index again with dedup.{kind} = true"
            )
        for name, value in values.items():
            if made.get(name) != value and name != "probe":
                raise BadInputError(
                    f"{setting}: was made with dedup.{name} = {made.get(name)!r}, here it is {value!r}; use the same"
                )
        if made.get("probe") != values["probe"]:
            raise BadInputError(
                f"{setting}: its {kind} keys were made by another version of this program, which cuts or hashes words "
                "in another way; make the index again"
            )
    return OpenedIndex(folder, setting, sha256_of(folder / MANIFEST_NAME), manifest)


def check_index_target(path: Path, name: str) -> None:
    """Refuse to overwrite another preparation's index, before any work."""
    setting = f"dedup.index = {str(path)!r}"
    if path.exists() and not path.is_dir():
        raise BadInputError(f"{setting}: is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        made_by = _read_manifest(path, setting).name
        if made_by != name:
            raise BadInputError(f"{setting}: holds the index of {made_by!r}; name another folder, or remove it first")


def write_index(path: Path, name: str, settings: DedupSettings, parts: Mapping[str, Path]) -> bool:
    """Write the index of a preparation; ``parts`` has the folder of keys of each kind. False if it was there already.

    It is made beside ``path`` and renamed, so it is there whole or not at all.
    """
    kinds = settings_of_kinds(settings)
    files = {
        f"{kind}/{file.relative_to(folder)}": file
        for kind, folder in parts.items()
        for file in sorted(folder.rglob("*.index"))
    }
    entries = {key: IndexFile(bytes=file.stat().st_size, sha256=sha256_of(file)) for key, file in files.items()}
    manifest = IndexManifest(format_version=FORMAT_VERSION, name=name, kinds=kinds, files=entries)
    if (path / MANIFEST_NAME).is_file() and _read_manifest(path, f"dedup.index = {str(path)!r}") == manifest:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        for key, file in files.items():
            target = partial / key
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            fsync_path(target)
        partial.mkdir(exist_ok=True)
        write_json_atomically(partial / MANIFEST_NAME, manifest.model_dump())
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_path(path.parent)
    return True


def _inside(folder: Path, name: str, setting: str) -> Path:
    try:
        return path_inside(folder, name)
    except ValueError as error:
        raise BadInputError(f"{setting}: its manifest names a file outside of it: {error}") from None
