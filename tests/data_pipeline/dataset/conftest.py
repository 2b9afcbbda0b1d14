"""A small data set of shards written by hand, with provenance, made in milliseconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.dataset.publish import build_manifest, publish
from data_pipeline.dataset.shards import Origin, ShardWriter
from data_pipeline.tokenizer.bpe import SentencePieceTokenizer, train_tokenizer

DOMAINS = ("law", "prose")
TEXTS = [f"Document number {number} speaks of rivers, </s> and of harbours.\nIts end." for number in range(12)]
SOURCES = [{"source": "dump", "files": ["a.jsonl", "b.jsonl"]}, {"source": "books", "files": ["c.txt"]}]


def origin_of(number: int) -> Origin:
    """Where document ``number`` of ``TEXTS`` came from."""
    return Origin(1, 0, 0) if number == 7 else Origin(0, number % 2, 100 * number)


def make_stage(folder: Path, texts: list[str] = TEXTS) -> Path:
    """What the shards stage leaves: two train shards and a validation shard; the tokenizer and sources beside them."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, 320))
    tokenizer = SentencePieceTokenizer.load(folder / "tokenizer.model")
    for name, numbers in (("train/0", range(5)), ("train/1", range(5, 9)), ("validation/0", range(9, len(texts)))):
        with ShardWriter(folder / f"{name}.bin", tokenizer.vocab_size) as writer:
            for number in numbers:
                ids = [*tokenizer.encode(texts[number]), tokenizer.end_id]
                writer.add(ids, len(texts[number].encode()), number % 2, origin_of(number))
    (folder / "documents.jsonl.gz").write_bytes(b"")
    (folder / "gzip9.json").write_text("1")
    (folder / "files.json").write_text(json.dumps(SOURCES))
    return folder


def publish_stage(stage: Path, output: Path) -> Path:
    """Publish a stage; returns ``output``."""
    manifest, places = build_manifest(
        "made", stage, stage / "tokenizer.model", DOMAINS, "0" * 64, sources_path=stage / "files.json"
    )
    publish(manifest, places, {"kept": 1}, output)
    return output


@pytest.fixture(scope="session")
def made_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished shards stage; tests must not change it."""
    return make_stage(tmp_path_factory.mktemp("made") / "stage")


@pytest.fixture
def made(made_stage: Path, tmp_path: Path) -> Path:
    """A published data set that a test may damage: its files are copies."""
    shutil.copytree(made_stage, tmp_path / "stage")
    return publish_stage(tmp_path / "stage", tmp_path / "made")


@pytest.fixture(scope="session")
def stage_of() -> Callable[..., Path]:
    """Call ``stage_of(folder, texts)``."""
    return make_stage


@pytest.fixture(scope="session")
def publish_to() -> Callable[[Path, Path], Path]:
    """Call ``publish_to(stage, output)``."""
    return publish_stage


@pytest.fixture(scope="session")
def made_texts() -> list[str]:
    """The texts of the data set, 9 to train and 3 to validate."""
    return TEXTS
