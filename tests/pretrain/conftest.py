"""Small data sets of random documents, made without the pipeline."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.dataset.publish import build_manifest, publish
from data_pipeline.dataset.reader import Dataset, open_dataset
from data_pipeline.dataset.shards import ShardWriter
from data_pipeline.tokenizer.bpe import train_tokenizer

VOCABULARY = 300
END = 1
DOMAINS = ["a", "b", "c"]


def make_dataset(folder: Path, seed: int = 3, longest: int = 90, shards: int = 5, text: str = "some words") -> Dataset:
    """Documents of 1 to ``longest`` tokens in three domains: 5 x 333 tokens and more to train, 3 x 333 held out."""
    (folder / "stage").mkdir(parents=True)
    stage = folder / "stage"
    (stage / "t.model").write_bytes(train_tokenizer([f"{text} to train on", "and some more of them"], VOCABULARY))
    generator = random.Random(seed)
    for split, number_of_shards in (("train", shards), ("validation", 3)):
        for number in range(number_of_shards):
            with ShardWriter(stage / split / f"{number:05d}.bin", VOCABULARY) as writer:
                while writer.tokens < 333:
                    ids = [generator.randrange(2, VOCABULARY) for _ in range(generator.randrange(1, longest))]
                    writer.add([*ids, END], generator.randrange(1, 4) * len(ids), generator.randrange(3))
    (stage / "documents.jsonl.gz").write_bytes(b"")
    (stage / "gzip9.json").write_text(json.dumps(1))
    manifest, places = build_manifest("made", stage, stage / "t.model", DOMAINS, "0" * 64)
    publish(manifest, places, {}, folder / "out")
    return open_dataset(folder / "out", verify=True)


@pytest.fixture(scope="session")
def dataset_maker() -> Callable[..., Dataset]:
    """Call ``dataset_maker(folder, seed=3, longest=90, shards=5)``."""
    return make_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set of five training shards; tests must not change it."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))
