"""Each profile keeps its own kind of text and drops junk; measured on text that is installed with what we depend on."""

from __future__ import annotations

import importlib.util
import inspect
import json
import lzma
import random
import string
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from datatrove.data import Document

from data_pipeline.clean.pipeline import DocumentCleaner
from data_pipeline.clean.profiles import ProfileName
from data_pipeline.clean.settings import CleanSettings
from launch.settings import BadInputError, parse_settings

PARAGRAPH = (
    "When the town council met on Monday, the mayor said that the bridge would have to be closed for repairs until "
    "the spring. Shop owners were worried. They asked whether the buses could take another way, and what it would "
    "cost them. Nobody in the room could answer that, so a committee was formed to look into it with the engineers. "
    "Its first report is expected before the summer holidays."
)


def corpus(repository_root: Path, name: str) -> list[str]:
    path = repository_root / "data_pipeline" / "corpus" / f"{name}.jsonl.xz"
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in list(lines)[::10]]


def numpy_docstrings() -> list[str]:
    names = [name for name in dir(numpy) if callable(getattr(numpy, name)) and not name.startswith("_")]
    texts = [inspect.cleandoc(getattr(numpy, name).__doc__ or "") for name in names]
    return [text for text in dict.fromkeys(texts) if len(text) > 600]


def python_sources() -> list[str]:
    specification = importlib.util.find_spec("json")
    assert specification is not None
    assert specification.origin is not None
    library = Path(specification.origin).parents[1]
    return [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))[::2]]


def junk() -> list[str]:
    generator = random.Random(3)
    letters = ["".join(generator.choices(string.ascii_letters + string.digits + "+/", k=4000)) for _ in range(10)]
    repeated = [f"Click here to win number {index}!\n" * 200 for index in range(10)]
    symbols = ["".join(generator.choices("!@#$%^&*(){}[]|~=+-_/\\ ", k=3000)) for _ in range(10)]
    numbers = [" ".join(str(generator.randrange(10**6)) for _ in range(800)) for _ in range(10)]
    return letters + repeated + symbols + numbers + ["", " \n ", "x"]


def news() -> list[str]:
    return [PARAGRAPH.replace("Monday", f"Monday of week {week}") for week in range(30)]


def kept(profile: ProfileName, texts: list[str]) -> tuple[float, Counter[str]]:
    cleaner = DocumentCleaner(CleanSettings(profile=profile))
    documents = [Document(text=text, id=str(index)) for index, text in enumerate(texts)]
    drops = Counter(drop[1] if drop else "kept" for drop in map(cleaner.clean, documents))
    return drops["kept"] / len(texts), drops


@pytest.mark.parametrize("profile", ["web", "documentation", "code", "books"])
def test_junk_goes_under_every_profile(profile: ProfileName) -> None:
    share, drops = kept(profile, junk())
    assert share == 0, drops


def test_web_keeps_news() -> None:
    share, drops = kept("web", news())
    assert share == 1, drops


@pytest.mark.parametrize("name", ["aws", "factbook"])
def test_documentation_keeps_reference_text(name: str, repository_root: Path) -> None:
    share, drops = kept("documentation", corpus(repository_root, name))
    assert share > 0.94, drops


def test_documentation_keeps_manuals_that_rules_for_the_web_drop() -> None:
    texts = numpy_docstrings()
    assert len(texts) > 100
    share, drops = kept("documentation", texts)
    assert share > 0.9, drops
    assert kept("web", texts)[0] < 0.2


@pytest.mark.parametrize("name", ["austen", "treasury", "verse"])
def test_books_keep_prose_and_verse(name: str, repository_root: Path) -> None:
    texts = [text for text in corpus(repository_root, name) if len(text) >= 200]
    share, drops = kept("books", texts)
    assert share > 0.98, drops


def test_books_keep_verse_that_rules_for_the_web_drop(repository_root: Path) -> None:
    assert kept("web", corpus(repository_root, "verse"))[0] < 0.6


def test_code_keeps_source_files_as_they_are() -> None:
    sources = python_sources()
    share, drops = kept("code", sources)
    assert share > 0.95, drops
    assert kept("web", sources)[0] < 0.1
    cleaner = DocumentCleaner(CleanSettings.model_validate({"profile": "code", "personal_information": None}))
    for source in sources:
        document = Document(text=source, id="0")
        if cleaner.clean(document) is None:
            before = [line.rstrip() for line in source.replace("\f", "\n").split("\n") if line.strip()]
            assert [line for line in document.text.split("\n") if line] == before


def test_an_unknown_profile_is_named() -> None:
    values: dict[str, Any] = {"profile": "poems"}
    with pytest.raises(BadInputError, match=r"profile = \"poems\".*'web', 'documentation', 'code' or 'books'"):
        parse_settings(CleanSettings, values, "f.json")
