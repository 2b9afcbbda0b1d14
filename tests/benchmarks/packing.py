"""What best-fit packing costs each process: ``PYTHONPATH=. python tests/benchmarks/packing.py --documents 20000000``.

The table of a packing worked out in memory, as every process once did for itself; made in files, as the first process
does; and opened by each process after that. Each in a process of its own. Time by the clock; memory is what the process
has for itself (anonymous pages, their peak, sampled every 20 ms, above what it had before): mapped pages are shared.

Documents have log-normal lengths with a median of 400 tokens; only their ends are real, the tokens a hole in a file.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from data_pipeline.dataset.reader import TokenStream
from data_pipeline.dataset.shards import DOCUMENT, Shard
from pretrain.data.packing import BestFit, PackingCache
from pretrain.data.selection import DocumentStream

LENGTH, END, VOCABULARY = 2048, 1, 60_000
DOCUMENTS_PER_SHARD = 2_500_000


def make_ends(folder: Path, documents: int) -> None:
    """The document ends of shards of ``DOCUMENTS_PER_SHARD``, and their tokens as holes."""
    generator = np.random.default_rng(0)
    for number, first in enumerate(range(0, documents, DOCUMENTS_PER_SHARD)):
        count = min(DOCUMENTS_PER_SHARD, documents - first)
        lengths = generator.lognormal(math.log(400), 1.1, count).astype(np.uint64) + np.uint64(2)
        ends = np.cumsum(lengths)
        ends.tofile(folder / f"{number:05d}.index")
        with (folder / f"{number:05d}.bin").open("wb") as tokens:
            tokens.truncate(2 * int(ends[-1]))


def open_stream(folder: Path) -> DocumentStream:
    """The shards as one stream."""
    shards = []
    for path in sorted(folder.glob("*.bin")):
        ends = np.memmap(path.with_suffix(".index"), "<u8", "r")
        shards.append(Shard(path, np.memmap(path, "<u2", "r"), ends, np.empty(0, DOCUMENT)))
    return DocumentStream(TokenStream(shards, VOCABULARY))


def anonymous_bytes() -> int:
    """Memory that this process shares with nobody."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status")


def measure(folder: Path, documents: int, cache: Path | None, answer: Connection) -> None:
    """Open the packing once and send what it cost."""
    stream = open_stream(folder)
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    packed = BestFit(stream, LENGTH, END, None if cache is None else PackingCache(cache, "benchmark", documents))
    seconds = time.monotonic() - started
    done.set()
    watcher.join()
    kept = anonymous_bytes() - before
    sizes = {"peak_bytes": max(peak[0] - before, kept), "kept_bytes": kept, "table_bytes": packed.index_bytes}
    answer.send({"seconds": seconds, **sizes})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Cost of best-fit packing, in memory and shared.")
    parser.add_argument("--documents", type=int, default=20_000_000)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_ends(folder, options.documents)
        cases = {"in memory": None, "made in files": folder / "cache", "opened": folder / "cache"}
        print(f"{'':16}{'seconds':>10}{'peak MB':>10}{'kept MB':>10}{'table MB':>10}")
        for name, cache in cases.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(folder, options.documents, cache, theirs))
            process.start()
            results[name] = values = ours.recv()
            process.join()
            sizes = "".join(f"{values[key] / 1e6:10.1f}" for key in ("peak_bytes", "kept_bytes", "table_bytes"))
            print(f"{name:16}{values['seconds']:10.4f}{sizes}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
