"""How fast samples are found and read, how evenly sources are mixed, and what packing costs.

    nice -n 2 python tests/benchmarks/loader.py                    # two minutes, one core, 400 MB of /tmp
    python tests/benchmarks/loader.py --tokens 20000000 --json loader.json

Data: random token ids (uint16) in documents of log-normal length (median 400 tokens, as web text has), as one published
data set in a temporary folder, read from the page cache. Rates are tokens or samples a second of CPU time of this
process (``process_time``), so that a busy machine does not change them much; the median of five rounds.

- *look-ups*: from sample number to block, at 488 million blocks, in batches of 65,536; one source, and a mixture of
  eight.
- *random access*: ``TokenStream.read`` of 2,049 tokens at random places; then whole rows through the sampler, as int64
  batches for the model, for both packings, with and without document ids.
- *mixing error*: the largest difference between a source's share and its weight, after 999,983 samples (a prime:
  after a million this mixture is exact).
- *shuffle*: standard deviations by which the chi-square statistic of a million places (100 x 100 cells) is off, and
  correlations of the order with itself.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # data_pipeline.py beside this is a benchmark

from data_pipeline.dataset.reader import TokenStream
from data_pipeline.dataset.shards import DOCUMENT, ShardWriter, open_shard
from data_pipeline.mixture import Interleaving, SamplingPlan, Source, Stage, whole_weights
from data_pipeline.permutation import KeyedPermutation
from pretrain.data.loader import batch_of
from pretrain.data.packing import BestFit, Concatenated, Packing, Row
from pretrain.data.selection import DocumentStream

LENGTH, VOCABULARY, END = 2048, 60_000, 1
BLOCKS = 488_000_000
WEIGHTS = (0.37, 0.21, 0.14, 0.11, 0.08, 0.05, 0.03, 0.01)
ROUNDS = 5


def make_stream(folder: Path, tokens: int, shard_tokens: int = 50_000_000) -> TokenStream:
    """Random documents of log-normal length in shards of at least ``shard_tokens``."""
    generator = np.random.default_rng(0)
    shards, total = [], 0
    while total < tokens:
        path = folder / f"{len(shards):05d}.bin"
        with ShardWriter(path, VOCABULARY) as writer:
            while writer.tokens < min(shard_tokens, tokens - total):
                lengths = generator.lognormal(math.log(400), 1.1, 1000).astype(np.int64) + 2
                ids = generator.integers(2, VOCABULARY, lengths.sum())
                ids[np.cumsum(lengths) - 1] = END
                records = np.zeros(lengths.size, dtype=DOCUMENT)
                records["utf8_bytes"] = 4 * lengths
                writer.append(ids, lengths, records)
            total += writer.tokens
        shards.append(open_shard(path))
    return TokenStream(shards, VOCABULARY)


def rate(work: Callable[[], int]) -> float:
    """Units of ``work``'s result a second of CPU time, the median of five rounds after one to warm up."""
    work()
    rates = []
    for _ in range(ROUNDS):
        started = time.process_time()
        done = work()
        rates.append(done / (time.process_time() - started))
    return statistics.median(rates)


def lookups(weights: tuple[float, ...]) -> float:
    """Samples located a second at 488M blocks: source, epoch, and the permuted block."""
    sources = [Source(f"s{k}", BLOCKS // len(weights), f"k{k}") for k in range(len(weights))]
    plan = SamplingPlan(sources, [Stage(0, LENGTH, weights)], LENGTH, 1024, 0)
    permutations = [KeyedPermutation(source.units, source.key.encode()) for source in sources]
    generator = np.random.default_rng(1)

    def work() -> int:
        ids = generator.integers(0, BLOCKS, 65_536)
        located = plan.locate(ids)
        for number, permutation in enumerate(permutations):
            permutation(located.place[located.source == number])
        return ids.size

    return rate(work)


def random_reads(stream: TokenStream) -> float:
    """Tokens a second through ``TokenStream.read``, sequences of 2,049 at random places."""
    starts = np.random.default_rng(2).integers(0, stream.total_tokens - LENGTH - 1, 4000).tolist()

    def work() -> int:
        for start in starts:
            stream.read(start, LENGTH + 1)
        return len(starts) * (LENGTH + 1)

    return rate(work)


def random_batches(packing: Packing, with_documents: bool) -> float:
    """Tokens a second as batches of eight rows at random places, ready for a model."""
    blocks = np.random.default_rng(3).integers(0, packing.n_rows, 2000).tolist()

    def work() -> int:
        for first in range(0, len(blocks), 8):
            rows: list[Row] = [packing.read(b, 0, LENGTH, with_documents) for b in blocks[first : first + 8]]
            batch_of(range(8), rows)
        return len(blocks) * LENGTH

    return rate(work)


def mixing_error(samples: int = 999_983) -> float:
    """The largest difference between share and weight after ``samples``."""
    counts = Interleaving(whole_weights(WEIGHTS)).counts(samples)
    return max(abs(count / samples - weight) for count, weight in zip(counts, WEIGHTS, strict=True))


def shuffle_quality(size: int = 1_000_000, cells: int = 100) -> dict[str, float]:
    """Chi-square of places in standard deviations; correlations of order, neighbours and next epoch by sqrt(size)."""
    first, second = (KeyedPermutation(size, f"epoch/{epoch}".encode())(np.arange(size)) for epoch in (0, 1))
    counts = np.histogram2d(np.arange(size), first, bins=cells)[0]
    expected, freedom = size / cells**2, (cells - 1) ** 2
    statistic = ((counts - expected) ** 2 / expected).sum()

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1] * math.sqrt(size))

    return {
        "places_chi_square_deviations": float((statistic - freedom) / math.sqrt(2 * freedom)),
        "order_correlation_deviations": correlation(np.arange(size), first),
        "neighbour_correlation_deviations": correlation(first[:-1], first[1:]),
        "epoch_correlation_deviations": correlation(first, second),
    }


def measure(folder: Path, tokens: int) -> dict[str, float]:
    """Every number of the table."""
    stream = make_stream(folder, tokens)
    documents = DocumentStream(stream)
    started = time.process_time()
    best_fit = BestFit(documents, LENGTH, END)
    packing_seconds = time.process_time() - started
    n_documents = sum(shard.document_ends.size for shard in stream.shards)
    concatenated = Concatenated(documents, LENGTH)
    # How many documents that would fit a row are cut all the same.
    ends = documents.document_ends(0, stream.total_tokens)
    starts = np.concatenate([[0], ends[:-1]])
    short = ends - starts <= LENGTH
    cut = (np.maximum(starts - 1, 0) // LENGTH != (ends - 2) // LENGTH) & short
    return {
        "lookups_per_second_one_source": lookups((1.0,)),
        "lookups_per_second_eight_sources": lookups(WEIGHTS),
        "random_read_tokens_per_second": random_reads(stream),
        "concatenate_tokens_per_second": random_batches(concatenated, False),
        "concatenate_document_ids_tokens_per_second": random_batches(concatenated, True),
        "best_fit_tokens_per_second": random_batches(best_fit, False),
        "best_fit_document_ids_tokens_per_second": random_batches(best_fit, True),
        "best_fit_padding_share": best_fit.padding_share,
        "best_fit_index_bytes_per_document": best_fit.index_bytes / n_documents,
        "best_fit_packing_microseconds_per_document": 1e6 * packing_seconds / n_documents,
        "concatenate_share_of_short_documents_cut": float(cut.sum() / short.sum()),
        "mixing_error": mixing_error(),
        **shuffle_quality(),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Speed and evenness of the loader.")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="size of the data set that is read")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), options.tokens)
    table = Table(title=f"loader, one core, {options.tokens:,} tokens, rows of {LENGTH}")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in results.items():
        table.add_row(name.replace("_", " "), f"{value:,.0f}" if value > 1000 else f"{value:.3g}")
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
