"""Text to token shards: our stage against datatrove's ``DocumentTokenizer``, on one core, the same ids.

    nice -n 2 python tests/benchmarks/tokenise.py [--vocabulary 16000] [--repeat 1]

reads the embedded corpus (19 MB), trains a tokenizer on it, and times, in seconds of CPU: each encoder alone,
datatrove's reader and tokenizer (documents not shuffled), and our whole stage (reader, counts, self-check, audit,
sidecars, hashes, merge). Tokens must be equal. The self-check costs the same on any corpus, so ``--repeat`` shows what
a larger one would see (encoders that remember words gain from the repetition too). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.utils.logging import logger
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # data_pipeline.py beside this is a benchmark

from data_pipeline.dataset.merge import MergeShards, plan_shards
from data_pipeline.dataset.tokenise import tokenise_pipeline
from data_pipeline.inputs.readers import stage_files
from data_pipeline.tokenizer.bpe import END_PIECE, SPACE_MARK, SentencePieceTokenizer, sample_lines, train_tokenizer
from data_pipeline.tokenizer.conversion import tokenizer_json
from data_pipeline.tokenizer.engine import FASTEST_FIRST, choose_engine, create_engine
from data_pipeline.tokenizer.self_check import adversarial_texts, sample_texts

ROOT = Path(__file__).resolve().parents[2]
PIECES = 4
# Stock tokenizers start threads for a batch; CPU time would be the same, but a core is what is measured.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process while ``work`` runs."""
    start = time.process_time()
    work()
    return time.process_time() - start


def run(pipeline: Sequence[Any], tasks: int) -> None:
    """Each task of a pipeline, in this process, as datatrove's executors run it."""
    for rank in range(tasks):
        data: Any = None
        for step in pipeline:
            data = step.run(data, rank, tasks)
        for _ in data or ():
            pass


def write_corpus(folder: Path, repeat: int) -> list[str]:
    """The embedded corpus as the documents of an earlier stage; returns its texts.

    U+2581, which a stock tokenizer loses, becomes a space.
    """
    texts = []
    for path in sorted((ROOT / "data_pipeline" / "corpus").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"].replace(SPACE_MARK, " ") for line in lines]
    texts *= repeat
    folder.mkdir()
    for piece in range(PIECES):
        records = (
            {"text": text, "id": str(number), "metadata": {"domain": "text", "source": "corpus"}}
            for number, text in enumerate(texts[piece::PIECES])
        )
        content = "".join(json.dumps(record) + "\n" for record in records).encode()
        (folder / f"{piece:05d}.jsonl.zst").write_bytes(zstandard.compress(content))
    return texts


def main() -> None:
    """Time everything, check that the tokens are the same, print a table and JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocabulary", type=int, default=16_000)
    parser.add_argument("--repeat", type=int, default=1, help="how many times the corpus")
    options = parser.parse_args()
    os.environ |= ONE_THREAD
    logger.remove()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = write_corpus(folder / "documents", options.repeat)
        megabytes = sum(len(text.encode()) for text in texts) / 1e6
        model = folder / "tokenizer.model"
        model.write_bytes(train_tokenizer(sample_lines(texts[: len(texts) // options.repeat], 0.5), options.vocabulary))
        tokenizer = SentencePieceTokenizer.load(model)
        seconds: dict[str, float] = {}
        for engine in FASTEST_FIRST:
            encode = create_engine(engine, tokenizer)
            seconds[f"encode: {engine}"] = cpu_seconds(lambda encode=encode: encode(texts))

        values = json.loads(tokenizer_json(tokenizer.model))
        values["added_tokens"].append({**values["added_tokens"][0], "id": 1, "content": END_PIECE, "special": True})
        (folder / "tokenizer.json").write_text(json.dumps(values))
        stock = [
            JsonlReader(str(folder / "documents"), compression="zstd"),
            DocumentTokenizer(
                str(folder / "stock"), str(folder / "tokenizer.json"), eos_token=END_PIECE, shuffle_documents=False
            ),
        ]
        seconds["stage: datatrove"] = cpu_seconds(lambda: run(stock, PIECES))

        def ours() -> None:
            files = stage_files(folder / "documents")
            engine = choose_engine(tokenizer, [*adversarial_texts(tokenizer), *sample_texts(files)]).name
            pieces = folder / "pieces"
            pipeline = tokenise_pipeline(files, pieces, folder / "tallies", model, tokenizer.end_id, engine, ["text"])
            run(pipeline, PIECES)
            plan = plan_shards([pieces / f"{rank:05d}.bin" for rank in range(PIECES)], 10**9)
            run([MergeShards(plan, folder / "ours", tokenizer.vocab_size)], len(plan))

        seconds["stage: ours"] = cpu_seconds(ours)
        dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        theirs = np.concatenate([np.fromfile(path, dtype) for path in sorted((folder / "stock").glob("*.ds"))])
        mine = np.fromfile(folder / "ours" / "shard_00000.bin", dtype)
        equal = bool(np.array_equal(mine, theirs))

    table = Table(
        title=f"{megabytes:.1f} MB of text, vocabulary {options.vocabulary:,}, {mine.size:,} tokens, one core"
    )
    for column in ("", "CPU seconds", "MB/s"):
        table.add_column(column, justify="left" if not column else "right")
    for key, value in seconds.items():
        table.add_row(key, f"{value:.2f}", f"{megabytes / value:.1f}")
    Console().print(table)
    ratio = seconds["stage: datatrove"] / seconds["stage: ours"]
    print(f"our stage is {ratio:.1f} times as fast; tokens are {'equal' if equal else 'DIFFERENT'}")
    print(json.dumps({"megabytes": megabytes, "cpu_seconds": seconds, "ratio": ratio, "equal": equal}))


if __name__ == "__main__":
    main()
