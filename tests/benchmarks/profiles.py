"""What each cleaning profile keeps of each kind of text: ``python tests/benchmarks/profiles.py``.

Besides the embedded corpus and what is installed with Python, real technical text: the kernel's reStructuredText and
Perl's pod, fetched by package name with ``apt-get download`` (Debian; ``apt-get update`` first), unpacked into a
temporary folder, and read as the pipeline would read it. They are GPL-2, and GPL or Artistic: looked at, never shipped.

A kind is a list of documents; the table gives shares of them, and of their bytes where the two differ much: a tree of
reference text has many tables of contents, which should go.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "data_pipeline" / "clean")]

from corpora import debian_package  # noqa: E402
from datatrove.data import Document  # noqa: E402
from kinds_of_text import corpus, junk, numpy_docstrings, python_sources  # noqa: E402

from data_pipeline.clean.pipeline import DocumentCleaner  # noqa: E402
from data_pipeline.clean.profiles import PROFILES, ProfileName  # noqa: E402
from data_pipeline.clean.settings import CleanSettings  # noqa: E402

PACKAGES = {
    "kernel rst (linux-doc-6.12)": ("linux-doc-6.12", "usr/share/doc/linux-doc-6.12/Documentation", "*.rst.gz"),
    "Perl pod (perl-doc)": ("perl-doc", "usr/share/perl", "*.pod"),
}


def package_texts(package: str, folder: str, pattern: str) -> list[str]:
    """The files of a Debian package that match, as text."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)  # apt drops its rights to fetch
        return list(_texts(sorted((debian_package(package, Path(place)) / folder).rglob(pattern))))


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        try:
            yield content.decode()
        except UnicodeDecodeError:
            yield content.decode("latin-1")


def shares(profile: ProfileName, texts: Sequence[str]) -> tuple[float, float, Counter[str]]:
    """The share of the documents that ``profile`` keeps, of the bytes, and why the others went."""
    cleaner, drops = DocumentCleaner(CleanSettings(profile=profile)), Counter[str]()
    kept = kept_bytes = 0
    for text in texts:
        if drop := cleaner.clean(Document(text=text, id="0")):
            drops[drop[1]] += 1
        else:
            kept, kept_bytes = kept + 1, kept_bytes + len(text.encode())
    return kept / len(texts), kept_bytes / max(sum(len(text.encode()) for text in texts), 1), drops


def main() -> int:
    """Print a row of the table for each kind, and for the packages why documents went."""
    parser = argparse.ArgumentParser(description="What each cleaning profile keeps.")
    parser.add_argument("--offline", action="store_true", help="leave out what has to be downloaded")
    options = parser.parse_args()
    names = {"austen": "Austen", "treasury": "Treasury of David", "verse": "verse"}
    names |= {"aws": "AWS API documentation", "factbook": "Factbook"}
    kinds = {title: corpus(ROOT, name) for name, title in names.items()}
    kinds |= {"numpy docstrings": numpy_docstrings(), "Python sources": python_sources()}
    if not options.offline:
        kinds |= {title: package_texts(*where) for title, where in PACKAGES.items()}
    print("| text | " + " | ".join(PROFILES) + " |\n| --- |" + " --- |" * len(PROFILES))
    for title, texts in {**kinds, "junk": junk()}.items():
        found = {profile: shares(profile, texts) for profile in PROFILES}  # type: ignore[arg-type]  # their names
        cells = [
            f"{of_documents:.0%}" + (f" ({of_bytes:.0%} of the bytes)" if abs(of_documents - of_bytes) > 0.05 else "")
            for of_documents, of_bytes, _ in found.values()
        ]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)
        if title in PACKAGES:
            size = sum(len(text.encode()) for text in texts) / 1e6
            print(f"{title}: {len(texts):,} documents, {size:.1f} MB", file=sys.stderr)
            for profile, (_, _, drops) in found.items():
                print(f"  {profile}: {', '.join(f'{why} {n}' for why, n in drops.most_common(8))}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
