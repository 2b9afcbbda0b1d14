"""Texts of one kind each, installed with what we depend on, and junk: for tests and benchmarks of cleaning."""

from __future__ import annotations

import importlib.util
import inspect
import json
import lzma
import random
import string
from pathlib import Path

import numpy

PARAGRAPH = (
    "When the town council met on Monday, the mayor said that the bridge would have to be closed for repairs until "
    "the spring. Shop owners were worried. They asked whether the buses could take another way, and what it would "
    "cost them. Nobody in the room could answer that, so a committee was formed to look into it with the engineers. "
    "Its first report is expected before the summer holidays."
)


def corpus(repository_root: Path, name: str) -> list[str]:
    """Every tenth text of one file of the embedded corpus."""
    path = repository_root / "data_pipeline" / "corpus" / f"{name}.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in list(lines)[::10]]


def numpy_docstrings() -> list[str]:
    """Reference text in the form of docstrings."""
    names = [name for name in dir(numpy) if callable(getattr(numpy, name)) and not name.startswith("_")]
    texts = [inspect.cleandoc(getattr(numpy, name).__doc__ or "") for name in names]
    return [text for text in dict.fromkeys(texts) if len(text) > 600]


def python_sources() -> list[str]:
    """Every second top module of the standard library."""
    specification = importlib.util.find_spec("json")
    assert specification is not None
    assert specification.origin is not None
    library = Path(specification.origin).parents[1]
    return [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[::2]]


def junk() -> list[str]:
    """Random letters, one line over and over, symbols, numbers, and next to nothing."""
    generator = random.Random(3)
    letters = ["".join(generator.choices(string.ascii_letters + string.digits + "+/", k=4000)) for _ in range(10)]
    repeated = [f"Click here to win number {index}!\n" * 200 for index in range(10)]
    symbols = ["".join(generator.choices("!@#$%^&*(){}[]|~=+-_/\\ ", k=3000)) for _ in range(10)]
    numbers = [" ".join(str(generator.randrange(10**6)) for _ in range(800)) for _ in range(10)]
    return letters + repeated + symbols + numbers + ["", " \n ", "x"]


def news() -> list[str]:
    """What the rules for the web were made for."""
    return [PARAGRAPH.replace("Monday", f"Monday of week {week}") for week in range(30)]
