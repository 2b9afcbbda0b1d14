"""Each profile keeps its own kind of text and drops junk; measured on text that is installed with what we depend on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from kinds_of_text import corpus, junk, news, numpy_docstrings, python_sources

from data_pipeline.clean.pipeline import DocumentCleaner
from data_pipeline.clean.profiles import ProfileName
from data_pipeline.clean.settings import CleanSettings
from launch.settings import BadInputError, parse_settings


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
