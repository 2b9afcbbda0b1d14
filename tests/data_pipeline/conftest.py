"""A small corpus with known flaws, and one data set prepared from it for all tests of this folder."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.config import DataSettings
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.progress import Reporter
from data_pipeline.preparation import prepare

WORDS = (
    "the of and to that have with river mountain letter evening market captain garden winter question answer window "
    "morning travel reason silver number water service request table history village harbour people music"
)


def make_text(generator: random.Random, sentences: int = 30) -> str:
    """Unrepetitive English-looking text."""
    return " ".join(
        " ".join(generator.choices(WORDS.split(), k=generator.randint(6, 14))).capitalize() + "."
        for _ in range(sentences)
    )


def make_documents() -> list[dict[str, Any]]:
    """200 good documents in two domains, one exact copy, one near copy, one too short, one empty."""
    generator = random.Random(7)
    documents = [
        {
            "id": f"d{index}",
            "text": make_text(generator),
            "metadata": {"domain": ("prose", "technical")[index % 3 == 0], "source": "made"},
        }
        for index in range(200)
    ]
    copy = {**documents[5], "id": "exact-copy"}
    near = {**documents[8], "id": "near-copy", "text": documents[8]["text"] + " One more river."}
    short = {"id": "short", "text": "Too short.", "metadata": {"domain": "prose", "source": "made"}}
    empty = {"id": "empty", "text": "", "metadata": {"domain": "prose", "source": "made"}}
    return [*documents, copy, near, short, empty]


def write_corpus(folder: Path, documents: list[dict[str, Any]], files: int = 3) -> None:
    """Deal ``documents`` to ``files`` compressed files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        lines = "".join(json.dumps(document) + "\n" for document in documents[index::files])
        (folder / f"part{index}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def make_settings(corpus: Path, output: Path, **sections: Any) -> DataSettings:
    """Settings for the small corpus; a piece a file, several shards and a tiny vocabulary."""
    values: dict[str, Any] = {
        "name": "small",
        "output": str(output),
        "sources": [{"path": str(corpus)}],
        "inputs": {"piece_bytes": 1},
        "execution": {"workers": 1},
        "split": {"validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 420},
        "shards": {"max_tokens": 8000},
    }
    return DataSettings.model_validate({**values, **sections})


def prepare_quietly(settings: DataSettings) -> list[str]:
    """Run the pipeline in this process; returns the lines it printed."""
    stream = io.StringIO()
    reporter = Reporter(Console(file=stream, width=200, highlight=False))
    prepare(settings, LocalExecutor(settings.execution.workers), reporter)
    return stream.getvalue().splitlines()


@pytest.fixture(scope="session")
def small_documents() -> list[dict[str, Any]]:
    """The documents of ``small_corpus``."""
    return make_documents()


@pytest.fixture(scope="session")
def corpus_writer() -> Callable[..., None]:
    """Call ``corpus_writer(folder, documents)``."""
    return write_corpus


@pytest.fixture(scope="session")
def settings_for() -> Callable[..., DataSettings]:
    """Call ``settings_for(corpus, output, section={...})``."""
    return make_settings


@pytest.fixture(scope="session")
def run_pipeline() -> Callable[[DataSettings], list[str]]:
    """Call ``run_pipeline(settings)``; gives the printed lines."""
    return prepare_quietly


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compressed JSON lines."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, make_documents())
    return folder


@pytest.fixture(scope="session")
def small_dataset(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set; tests must not change it."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    prepare_quietly(make_settings(small_corpus, output))
    return output
