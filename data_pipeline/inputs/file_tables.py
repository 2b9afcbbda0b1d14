"""The files of each source: found, sorted by name, with their sizes and digests.

The table is what "the same input" means. It is sorted by name (by code point), so it does not depend on the order in
which a file system lists, and a document's origin is an index into it (parts.py).

**Digests** decide whether a finished stage is done again. On local disks they are hashes of content (XXH3 with 128
bits: a disk's speed, where SHA-256 costs a core a second for 1.2 GB; nobody attacks their own corpus). Of a remote file
that would be one more download, so it is what the store lists: an ETag or a checksum where there is one, else the time
of change. ``inputs.digest`` forces either, since hashing 60 TB takes hours from a parallel file system too.

**Trees.** Links are not followed, unless ``follow_links`` says so: a linked file elsewhere in the tree would count
twice, one outside of it would surprise, and circles of links would never end. With ``follow_links`` a folder is entered
once, however many links lead to it. What is left out is counted: links, files of no known format, devices.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec  # type: ignore[import-untyped]
import xxhash
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from fsspec.utils import glob_translate  # type: ignore[import-untyped]

from data_pipeline.config import InputSettings, SourceSettings
from data_pipeline.inputs.formats import compression_of, format_of
from data_pipeline.inputs.parts import Format, Part
from data_pipeline.inputs.streams import READ_BYTES, open_part
from launch.settings import BadInputError, render_value

HASHING_THREADS = 8
# What file systems list that changes when a file does; the first that is there is used.
TAGS = ("ETag", "etag", "md5Hash", "crc32c", "checksum", "content_md5", "LastModified", "last_modified", "updated")
LOCAL_TAGS = ("mtime", "ino", "created")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    name: str
    path: str
    format: Format
    stored_bytes: int
    digest: str


@dataclass(frozen=True)
class FileTable:
    """The sorted files of a source; ``left_out`` counts, by kind, what is there and is not read."""

    source: SourceSettings
    name: str
    files: tuple[SourceFile, ...]
    left_out: dict[str, int]

    def part(self, source: int, file: int, start: int = 0, end: int | None = None) -> Part:
        """A part of one of the files; ``source`` is this table's index."""
        entry, settings = self.files[file], self.source
        return Part(
            source,
            file,
            settings.path,
            entry.path,
            entry.name,
            entry.format,
            compression_of(entry.name),
            entry.stored_bytes,
            start,
            end,
            self.name,
            settings.domain,
            settings.text_key,
            settings.id_key,
            settings.encoding,
        )


@dataclass(frozen=True)
class _Listed:
    name: str
    path: str
    size: int
    tag: str


def find_files(sources: Sequence[SourceSettings], settings: InputSettings) -> list[FileTable]:
    """The file table of every source. A missing, unreadable or empty source is a ``BadInputError``."""
    return [_find(index, source, settings) for index, source in enumerate(sources)]


def _find(index: int, source: SourceSettings, settings: InputSettings) -> FileTable:
    key = f"sources.{index}"
    left_out: Counter[str] = Counter()
    try:
        file_system, root = fsspec.core.url_to_fs(source.path)
        local = isinstance(file_system, LocalFileSystem)
        if local:
            listed = list(_walk_local(root, source.follow_links, left_out))
        else:
            listed = list(_walk_remote(file_system, root, left_out))
    except (ValueError, ImportError) as error:
        raise BadInputError(f"{key}.path = {render_value(source.path)}: no file system for it ({error})") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise BadInputError(
                f"{key}.path = {source.path!r}: no such folder; give the folder that holds the corpus "
                "(relative paths start at the current folder)"
            ) from None
        raise BadInputError(
            f"{key}.path = {source.path!r}: cannot be listed ({error.strerror or error}: {error.filename}); "
            "make it readable"
        ) from None
    chosen = list(_choose(key, source, listed, left_out))
    if not chosen:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items())[:8]) or "nothing"
        what = f"{key}.pattern = {source.pattern!r}: matches no file" if source.pattern else f"{key}: no file to read"
        raise BadInputError(
            f"{what} in {source.path} (found: {found}); expected files such as NAME.jsonl.zst, or another pattern, "
            "format or follow_links"
        )
    chosen.sort(key=lambda pair: pair[0].name)
    files = [SourceFile(entry.name, entry.path, kind, entry.size, entry.tag) for entry, kind in chosen]
    name = source.name or re.sub(r"[^A-Za-z0-9._-]+", "-", root.rstrip("/").rpartition("/")[2]).strip("-.") or "source"
    table = FileTable(source, name, tuple(files), dict(sorted(left_out.items())))
    if settings.digest == "content" or (settings.digest == "auto" and local):
        table = _with_content_digests(table, index)
    return table


def _choose(
    key: str, source: SourceSettings, listed: Sequence[_Listed], left_out: Counter[str]
) -> Iterator[tuple[_Listed, Format]]:
    """The files to read and their formats."""
    pattern = re.compile(glob_translate(source.pattern)) if source.pattern else None
    for entry in listed:
        if pattern is not None and not pattern.match(entry.name):
            continue
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise BadInputError(f"{key}: {entry.name!r}: the file's name is not UTF-8; rename it") from None
        kind = format_of(entry.name)
        if source.format != "auto":
            if pattern is not None or kind == source.format:
                yield entry, source.format
                continue
        elif kind is not None:
            yield entry, kind
            continue
        elif pattern is not None:
            raise BadInputError(
                f"{key}.format = 'auto': cannot tell the format of {entry.name} from its name; "
                "set format, or a pattern that leaves it out"
            )
        left_out[f"*{os.path.splitext(entry.name)[1].lower() or entry.name.rpartition('/')[2]}"] += 1


def _walk_local(root: str, follow_links: bool, left_out: Counter[str]) -> Iterator[_Listed]:
    """Regular files under ``root``, which may be a file itself; raises ``OSError`` for what cannot be listed."""
    status = os.stat(root)
    if not stat.S_ISDIR(status.st_mode):
        yield _local(os.path.basename(root), root, status)
        return
    entered = {(status.st_dev, status.st_ino)}
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = f"{below}/{entry.name}" if below else entry.name
                if entry.is_symlink() and not follow_links:
                    left_out["links"] += 1
                    continue
                try:
                    status = entry.stat()
                except OSError:
                    if not entry.is_symlink():
                        raise
                    left_out["broken links"] += 1
                    continue
                if stat.S_ISDIR(status.st_mode):
                    if (status.st_dev, status.st_ino) not in entered:
                        entered.add((status.st_dev, status.st_ino))
                        waiting.append(name)
                elif stat.S_ISREG(status.st_mode):
                    yield _local(name, entry.path, status)
                else:
                    left_out["devices and pipes"] += 1


def _local(name: str, path: str, status: os.stat_result) -> _Listed:
    return _Listed(name, path, status.st_size, f"{status.st_size} {status.st_mtime_ns}")


def _walk_remote(file_system: Any, root: str, left_out: Counter[str]) -> Iterator[_Listed]:
    found = file_system.find(root, detail=True)
    if not found and not file_system.exists(root):
        raise FileNotFoundError(root)
    prefix = root.rstrip("/") + "/"
    for path, entry in found.items():
        if entry.get("type") != "file" or entry.get("size") is None:
            left_out["entries without a size"] += 1
            continue
        name = path.removeprefix(prefix) if path.startswith(prefix) else path.rpartition("/")[2]
        tag = next((str(entry[key]) for key in TAGS if entry.get(key)), str(entry.get("created", "")))
        yield _Listed(name, path, int(entry["size"]), f"{entry['size']} {tag}")


def _with_content_digests(table: FileTable, index: int) -> FileTable:
    def hashed(position: int) -> SourceFile:
        entry, digest = table.files[position], xxhash.xxh3_128()
        with open_part(table.part(index, position)) as stored:
            while chunk := stored.read(READ_BYTES):
                digest.update(chunk)
        return SourceFile(entry.name, entry.path, entry.format, entry.stored_bytes, f"xxh3_128:{digest.hexdigest()}")

    with ThreadPoolExecutor(min(HASHING_THREADS, os.cpu_count() or 1)) as threads:
        return FileTable(table.source, table.name, tuple(threads.map(hashed, range(len(table.files)))), table.left_out)


def describe_files(tables: Sequence[FileTable]) -> Iterator[str]:
    """A line about each source: what will be read, and what was left out."""
    for table in tables:
        size = sum(file.stored_bytes for file in table.files) / 1e6
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in table.left_out.items())
        suffix = f"; left out: {left_out}" if left_out else ""
        yield f"{table.name}: {len(table.files):,} files, {size:,.2f} MB{suffix}"
