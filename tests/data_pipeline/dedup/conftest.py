"""Small corpora made by hand, one file a piece."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_pipeline.inputs.readers import InputFile, read_documents, stage_files

TextOf = Callable[[int], str]
WritePieces = Callable[[Path, Sequence[Sequence[str]]], list[InputFile]]
Kept = Callable[[Path], list[str]]


def _text_of(seed: int, words: int = 200) -> str:
    generator = random.Random(seed)  # letters only: digits would all count as 0
    return " ".join("".join(generator.choices("abcdefghij", k=5)) for _ in range(words))


def _write_pieces(folder: Path, texts_of_pieces: Sequence[Sequence[str]]) -> list[InputFile]:
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, texts in enumerate(texts_of_pieces):
        path = folder / f"{number:05d}.jsonl"
        lines = (
            json.dumps({"text": text, "id": f"{number}/{index}", "metadata": {"domain": "prose", "source": "made"}})
            for index, text in enumerate(texts)
        )
        path.write_text("\n".join(lines))
        files.append(InputFile(path))
    return files


@pytest.fixture(scope="session")
def text_of() -> TextOf:
    """``text_of(seed)``: 200 words that no other seed has in this order."""
    return _text_of


@pytest.fixture(scope="session")
def write_pieces() -> WritePieces:
    """``write_pieces(folder, texts of each piece)``; the ids are ``PIECE/POSITION``."""
    return _write_pieces


@pytest.fixture(scope="session")
def kept() -> Kept:
    """``kept(stage)``: the ids of the documents that a stage passed on, in order."""
    return lambda folder: [doc.id for file in stage_files(folder / "documents") for doc in read_documents(file)]
