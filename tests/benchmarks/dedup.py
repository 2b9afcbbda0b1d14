"""De-duplication measured: recall on planted copies against the theory, similarity of what goes, and speed.

    nice -n 2 python tests/benchmarks/dedup.py [--pairs 500] [--picture docs/dedup_recall.png]

1. ``--pairs`` pairs of each of ten similarities, under two settings, and as many exact copies and unrelated texts, go
   through the stages (``data_pipeline/dedup/planted.py``). Table, and the upper picture.
2. The embedded corpus (19 MB) goes through them too; the lower picture shows the Jaccard similarity of each near-copy
   that was removed to the copy that was kept, counted from the two texts.
3. CPU seconds of each stage; of our MinHash signatures and datatrove's given the same word splitter; and of
   decontamination. Signatures must be equal to the byte.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature
from datatrove.utils.logging import logger
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # data_pipeline.py beside this is a benchmark

from data_pipeline.clean.words import FastWords
from data_pipeline.config import DecontaminationSettings, DedupSettings, EvaluationSetSettings
from data_pipeline.dedup.decontamination import decontaminate
from data_pipeline.dedup.exact import remove_exact_duplicates
from data_pipeline.dedup.minhash import SignMinHash, remove_near_duplicates
from data_pipeline.dedup.normal_form import normal_words
from data_pipeline.dedup.planted import PlantedRow, PlantedStudy, binomial_tail, probability_found, run_planted_study
from data_pipeline.dedup.sentences import remove_duplicate_sentences
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.inputs.readers import InputFile, read_documents, stage_files

ROOT = Path(__file__).resolve().parents[2]
SIMILARITIES = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.95)
SETTINGS = {"14 x 8 (default)": DedupSettings(), "20 x 5": DedupSettings(buckets=20, hashes_per_bucket=5)}
COLOURS = ("#2f6fab", "#c4622d")
EVALUATION_ITEMS = 2000
PIECES = 8


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process while ``work`` runs."""
    start = time.process_time()
    work()
    return time.process_time() - start


def write_corpus(folder: Path) -> tuple[list[InputFile], float]:
    """The embedded corpus as ``PIECES`` files; returns them and their megabytes of text."""
    folder.mkdir()
    paths = sorted((ROOT / "data_pipeline" / "corpus").glob("*.jsonl.xz"))
    lines = [line for path in paths for line in lzma.decompress(path.read_bytes()).splitlines(keepends=True)]
    files = [InputFile(folder / f"{piece:05d}.jsonl") for piece in range(PIECES)]
    size = -(-len(lines) // PIECES)
    for piece, file in enumerate(files):
        file.path.write_bytes(b"".join(lines[piece * size : (piece + 1) * size]))
    return files, sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6


def similarities_of_removed(stage: Path, before: Sequence[InputFile], n: int) -> list[float]:
    """The Jaccard similarity of each removed document to the one kept for it."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = normal_words(text)
        return {tuple(words[start : start + n]) for start in range(len(words) - n + 1)}

    texts = [[document.text for document in read_documents(file)] for file in before]
    found = []
    for file in stage_files(stage / "dropped"):
        for document in read_documents(file):
            piece, position = map(int, document.metadata["duplicate_of"].split("/"))
            one, other = grams(document.text), grams(texts[piece][position])
            found.append(len(one & other) / len(one | other))
    return found


def compare_signatures(files: Sequence[InputFile], folder: Path, settings: DedupSettings) -> tuple[float, float]:
    """CPU seconds of our signatures and of datatrove's, which must be equal."""
    documents: list[Document] = [document for file in files for document in read_documents(file)]
    config = MinhashConfig(settings.ngram, settings.buckets, settings.hashes_per_bucket, settings.seed)
    stock = MinhashDedupSignature(str(folder / "stock"), config, language=FastWords())
    ours = cpu_seconds(lambda: SignMinHash(folder / "ours", settings).run(documents, 0, 1))
    theirs = cpu_seconds(lambda: stock.run(documents, 0, 1))
    for path in sorted((folder / "stock").rglob("*.sig")):
        assert path.read_bytes() == (folder / "ours" / path.relative_to(folder / "stock")).read_bytes(), path
    return ours, theirs


def make_evaluation_set(files: Sequence[InputFile], path: Path) -> DecontaminationSettings:
    """Items of 40 words, one in forty of them from the corpus, the others of words that it has not."""
    generator = np.random.default_rng(0)
    with path.open("w") as out:
        documents: Iterator[Document] = (document for file in files for document in read_documents(file))
        for number, document in zip(range(EVALUATION_ITEMS), documents, strict=False):
            made = ["".join(map(chr, row)) for row in generator.integers(97, 123, (40, 7))]
            words = made if number % 40 else document.text.split()[:40]
            out.write(json.dumps({"text": " ".join(words)}) + "\n")
    entry = EvaluationSetSettings(name="made", path=str(path), fields=("text",))
    return DecontaminationSettings(sets=(entry,), action="cut")


def interval(row: PlantedRow, chance: float = 0.025) -> tuple[float, float]:
    """The 95% confidence interval of a fraction found (Clopper and Pearson)."""

    def solve(too_low: Callable[[float], bool]) -> float:
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if too_low(middle) else (low, middle)
        return low

    missed = row.pairs - row.found
    return (
        solve(lambda p: binomial_tail(row.pairs, 1 - p, missed) < chance) if row.found else 0.0,
        solve(lambda p: binomial_tail(row.pairs, p, row.found) > chance) if missed else 1.0,
    )


def draw(studies: dict[str, PlantedStudy], removed: Sequence[float], path: Path) -> None:
    """Recall by similarity over what is removed from the embedded corpus by similarity, on one axis."""
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context({**style, "grid.color": "#e6e6e6", "axes.axisbelow": True}):
        figure = Figure(figsize=(7.2, 6.2), layout="constrained")
        recall, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        s = np.linspace(0, 1, 400)
        for colour, (name, study) in zip(COLOURS, studies.items(), strict=True):
            theory = [probability_found(float(value), SETTINGS[name]) for value in s]
            recall.plot(s, theory, color=colour, linewidth=1.6, label=f"{name}: theory")
            centre = np.array([row.found_fraction for row in study.rows])
            ends = np.array([interval(row) for row in study.rows])
            recall.errorbar(
                [row.similarity for row in study.rows],
                centre,
                yerr=np.abs(ends.T - centre),
                fmt="o",
                markersize=4.5,
                capsize=2.5,
                color=colour,
                label=f"{name}: planted pairs found",
            )
        pairs = next(iter(studies.values())).unrelated
        recall.set_ylabel("probability that a pair is found")
        recall.set_title(
            f"Near-duplicates found, by similarity ({pairs} planted pairs a point, 95% intervals)",
            loc="left",
            fontsize=11,
        )
        recall.legend(frameon=False, loc="upper left")
        recall.set_ylim(-0.02, 1.04)
        histogram.hist(removed, bins=np.linspace(0, 1, 41), color="#7a8b99", edgecolor="white", linewidth=0.5)
        histogram.set_ylabel("documents")
        histogram.set_xlabel("Jaccard similarity of the sets of runs of 5 words")
        histogram.set_title(
            f"{len(removed)} near-duplicates removed from the embedded corpus, by similarity to the copy kept",
            loc="left",
            fontsize=11,
        )
        histogram.set_xlim(0, 1.01)
        figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print tables, draw."""
    parser = argparse.ArgumentParser(description="De-duplication: recall, what is removed, and speed.")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "dedup_recall.png")
    options = parser.parse_args()
    logger.remove()
    console, executor = Console(), LocalExecutor(1)
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        studies = {}
        for number, (label, settings) in enumerate(SETTINGS.items()):
            study = run_planted_study(executor, folder / f"study{number}", settings, SIMILARITIES, options.pairs)
            studies[label] = study
            table = Table("similarity", "found", "theory", "chance of a count so far off", title=f"{label}")
            for row in study.rows:
                found = f"{row.found_fraction:.3f}"
                table.add_row(
                    f"{row.similarity:.3f}", found, f"{row.expected_fraction:.3f}", f"{row.tail_probability:.3f}"
                )
            console.print(table)
            console.print(
                f"exact copies found {study.exact_found} of {study.exact_pairs}; unrelated texts removed "
                f"{study.unrelated_removed} of {study.unrelated}; pairs that kept the second copy "
                f"{study.not_the_first_kept}"
            )
            result[label] = asdict(study)

        files, megabytes = write_corpus(folder / "corpus")
        stages = {
            "exact": lambda: remove_exact_duplicates(executor, files, folder / "exact"),
            "minhash": lambda: remove_near_duplicates(
                executor, stage_files(folder / "exact/documents"), folder / "minhash", DedupSettings()
            ),
            "sentences": lambda: remove_duplicate_sentences(
                executor, stage_files(folder / "minhash/documents"), folder / "sentences", DedupSettings()
            ),
            "decontaminate": lambda: decontaminate(
                executor,
                stage_files(folder / "minhash/documents"),
                folder / "decontaminate",
                make_evaluation_set(files, folder / "set.jsonl"),
            ),
        }
        speeds = {name: megabytes / cpu_seconds(work) for name, work in stages.items()}
        removed = similarities_of_removed(
            folder / "minhash", stage_files(folder / "exact/documents"), DedupSettings().ngram
        )
        ours, theirs = compare_signatures(files, folder / "signatures", DedupSettings())
    table = Table("stage", "MB/s of CPU", title=f"{megabytes:.1f} MB, one core")
    for stage, speed in {
        **speeds,
        "signatures alone": megabytes / ours,
        "datatrove's, same splitter": megabytes / theirs,
    }.items():
        table.add_row(stage, f"{speed:.2f}")
    console.print(table)
    low, middle = min(removed), float(np.median(removed))
    console.print(f"{len(removed)} near-duplicates removed: similarity at least {low:.3f}, median {middle:.3f}")
    draw(studies, removed, options.picture)
    result["embedded"] = {"removed": len(removed), "least_similarity": low, "median_similarity": middle}
    result["mb_per_cpu_second"] = {**speeds, "signatures": megabytes / ours, "datatrove_signatures": megabytes / theirs}
    result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    console.print(f"signatures: {theirs / ours:.2f} times datatrove's speed; wrote {options.picture}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
