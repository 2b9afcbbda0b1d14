"""Cleaning against stock datatrove with the same blocks and thresholds: ``python tests/benchmarks/clean.py``.

Both clean the embedded corpus (19 MB) as web pages in this process, from documents in memory to compressed files,
datatrove step by step with its own blocks, ours in one step. Both split words by the same fast splitter (datatrove's
own, spaCy, takes six to ten times as long). CPU seconds of one core, so that other work on the machine does not count.

What differs in the work: ours normalises white space as well, keeps samples and counts; stock identifies the language
of the whole text, ours of a sample (``--whole-text`` makes ours read all of it, too).
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from datatrove.data import Document  # noqa: E402
from datatrove.pipeline.base import PipelineStep  # noqa: E402
from datatrove.pipeline.writers import JsonlWriter  # noqa: E402
from datatrove.utils.logging import logger  # noqa: E402
from stock_cleaning import stock_cleaning  # noqa: E402

from data_pipeline.clean.pipeline import clean_pipeline  # noqa: E402
from data_pipeline.clean.settings import CleanSettings  # noqa: E402
from data_pipeline.clean.words import FastWords, Page  # noqa: E402


class FromMemory(PipelineStep):
    """A reader of copies of the same documents."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = texts

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """All documents."""
        for index, text in enumerate(self.texts):
            yield Document(text=text, id=str(index), metadata={"domain": "text", "source": "corpus"})


def corpus_texts() -> list[str]:
    """The embedded corpus."""
    texts = []
    for path in sorted((ROOT / "data_pipeline" / "corpus").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return texts


def stock_pipeline(texts: Sequence[str], folder: Path) -> list[PipelineStep]:
    """Datatrove's blocks from memory to compressed files."""
    documents = JsonlWriter(str(folder / "documents"), compression="zstd")
    return [FromMemory(texts), *stock_cleaning(FastWords(), folder / "dropped"), documents]


def run(pipeline: Sequence[PipelineStep]) -> tuple[float, dict[str, str]]:
    """CPU seconds, and the text of each document that is kept, by id."""
    start = time.process_time()
    data: Any = None
    for step in pipeline:
        data = step(data, 0, 1)
    kept = {document.id: document.text for document in data}
    return time.process_time() - start, kept


def main() -> int:
    """Run both and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description="Cleaning against stock datatrove.")
    parser.add_argument("--whole-text", action="store_true", help="identify the language of whole texts in ours too")
    parser.add_argument("--megabytes", type=float, default=float("inf"), help="how much of the corpus (default: all)")
    options = parser.parse_args()
    logger.remove()
    texts, size = [], 0.0
    for text in corpus_texts():
        if size >= options.megabytes:
            break
        texts.append(text)
        size += len(text.encode()) / 1e6
    settings = CleanSettings.model_validate(
        {
            "profile": "web",
            "length": {"min_characters": 1, "max_characters": 10**9},
            "language": {"sample_characters": 10**9} if options.whole_text else {},
        }
    )
    Page("\u0400").n_words  # noqa: B018 - builds the table of characters, once a process
    with tempfile.TemporaryDirectory() as folder:
        ours, kept = run(clean_pipeline(FromMemory(texts), [settings], Path(folder) / "ours"))
        stock, stock_kept = run(stock_pipeline(texts, Path(folder) / "stock"))
    agree = sum((str(index) in kept) == (str(index) in stock_kept) for index in range(len(texts))) / len(texts)
    print(f"{'':8}{'CPU s':>8}{'MB/s':>8}{'kept':>8}   of {len(texts):,} documents, {size:.1f} MB")
    for name, seconds, documents in (("ours", ours, kept), ("stock", stock, stock_kept)):
        print(f"{name:8}{seconds:8.2f}{size / seconds:8.2f}{len(documents):8,}")
    print(f"{stock / ours:.1f} times as fast; the decision is the same for {agree:.2%} of the documents")
    values = {"megabytes": size, "ours_seconds": ours, "stock_seconds": stock, "ratio": stock / ours, "agree": agree}
    print(json.dumps(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
