"""Our rules decide as datatrove's filters do, reason for reason, given the same words; on real and on made text."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean import gopher_repetition
from data_pipeline.clean.c4 import c4_editor
from data_pipeline.clean.fineweb import fineweb_rule
from data_pipeline.clean.gopher_quality import gopher_quality_rule
from data_pipeline.clean.gopher_repetition import gopher_repetition_rule
from data_pipeline.clean.rules import Rule, length_rule
from data_pipeline.clean.settings import (
    C4Settings,
    FineWebSettings,
    GopherQualitySettings,
    GopherRepetitionSettings,
    LengthSettings,
)
from data_pipeline.clean.words import FastWords, Page

WORDS = FastWords()
RULES: dict[str, tuple[Rule, BaseFilter]] = {
    "quality": (gopher_quality_rule(GopherQualitySettings()), GopherQualityFilter(language=WORDS)),
    "quality of short texts": (
        gopher_quality_rule(GopherQualitySettings(min_words=2, min_stop_words=1, min_alphabetic_words=0.3)),
        GopherQualityFilter(min_doc_words=2, min_stop_words=1, max_non_alpha_words_ratio=0.3, language=WORDS),
    ),
    "repetition": (gopher_repetition_rule(GopherRepetitionSettings()), GopherRepetitionFilter(language=WORDS)),
    "repetition of words only": (
        gopher_repetition_rule(
            GopherRepetitionSettings(
                max_duplicate_lines=None,
                max_duplicate_paragraphs=None,
                max_duplicate_line_characters=None,
                max_duplicate_paragraph_characters=None,
                top_ngrams=((1, 0.3), (3, 0.4), (2, 0.5)),
                duplicate_ngrams=((3, 0.3), (2, 0.6)),
            )
        ),
        GopherRepetitionFilter(
            None, None, None, None, ((1, 0.3), (3, 0.4), (2, 0.5)), ((3, 0.3), (2, 0.6)), language=WORDS
        ),
    ),
    "fineweb": (fineweb_rule(FineWebSettings()), FineWebQualityFilter(language=WORDS)),
}
C4 = {
    "c4": (C4Settings(), C4QualityFilter(language=WORDS)),
    "c4 without full stops": (
        C4Settings(terminal_punctuation=False, min_sentences=2, max_word_characters=12),
        C4QualityFilter(filter_no_terminal_punct=False, min_num_sentences=2, max_word_length=12, language=WORDS),
    ),
}

fragments = st.sampled_from(
    [
        "the",
        "of",
        "and",
        "to",
        "with",
        "in",
        "into",
        "to",
        "be",
        "it",
        "river.",
        "tea?",
        "end...",
        "…",
        "#",
        "##",
        "-",
        "•",
        "don't",
        "x-y",
        "a",
        "b",
        "ab",
        "c",
        "bc",
        "12",
        "3,4",
        "{",
        "}",
        "[3]",
        "lorem",
        "ipsum",
        "javascript",
        "cookie",
        "policy",
        "café",
        "中文",
        "हिन्दी",
        '"quoted."',
        "\n",
        "\n\n",
        "\n\n\n",
        "\n-",
        "\n•",
        "...\n",
        ".\n",
        "!\n",
        "same",
        "line",
        "here.\n",
    ]
)
made_texts = st.lists(fragments, max_size=120).map(" ".join) | st.text(
    alphabet=st.sampled_from("ab .\n-'#\u2026"), max_size=200
)


def reason_of(block: BaseFilter, document: Document) -> str | None:
    result = block.filter(document)
    return None if result is True else result[1]


@pytest.fixture(scope="session")
def real_texts(repository_root: Path) -> list[str]:
    """Every ninth document of the embedded corpus, and the same with pages run together, cut and repeated."""
    texts = []
    for path in sorted((repository_root / "data_pipeline" / "corpus").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in list(lines)[::9]]
    texts = [text[:20_000] for text in texts]
    generator = np.random.default_rng(1)
    spoilt = []
    for text in texts[::3]:
        lines = text.split("\n")
        start = int(generator.integers(len(lines)))
        spoilt.append("\n".join(lines + lines[start : start + int(generator.integers(1, 8))] * 3))
        spoilt.append(text[: int(generator.integers(20, 400))] * int(generator.integers(2, 5)))
    return texts + spoilt


@pytest.mark.parametrize("name", RULES)
def test_decisions_on_real_text_are_datatroves(name: str, real_texts: list[str]) -> None:
    rule, block = RULES[name]
    ours = [rule(Page(text)) for text in real_texts]
    assert ours == [reason_of(block, Document(text=text, id="0")) for text in real_texts]
    assert None in ours
    assert len(set(ours)) > 2, "the texts must break several rules"


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=150, deadline=None)
@given(text=made_texts)
def test_decisions_on_made_text_are_datatroves(name: str, text: str) -> None:
    rule, block = RULES[name]
    # datatrove divides by zero for a text without words, or without any but punctuation.
    if Page(text).n_words and any(character.isalnum() for character in text):
        assert rule(Page(text)) == reason_of(block, Document(text=text, id="0"))
    else:
        rule(Page(text))


@pytest.mark.parametrize("name", C4)
def test_c4_leaves_the_same_lines_as_datatrove(name: str, real_texts: list[str]) -> None:
    check_c4(name, real_texts)


@pytest.mark.parametrize("name", C4)
@settings(max_examples=150, deadline=None)
@given(text=made_texts)
def test_c4_leaves_the_same_lines_of_made_text(name: str, text: str) -> None:
    check_c4(name, [text])


def check_c4(name: str, texts: list[str]) -> None:
    editor = c4_editor(C4[name][0])
    for text in texts:
        document = Document(text=text, id="0")
        reason = reason_of(C4[name][1], document)
        assert editor(text) == (document.text, reason)


def test_hashes_that_collide_cost_time_but_change_nothing(
    real_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, block = RULES["repetition"]
    monkeypatch.setattr(
        gopher_repetition.NgramHashes, "of", lambda self, n: np.zeros(max(self.n_words - n + 1, 0), dtype=np.uint64)
    )
    for text in real_texts[::10]:
        assert rule(Page(text)) == reason_of(block, Document(text=text, id="0"))


def test_most_pages_are_cleared_without_counting_ngrams(real_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    for name in ("_top_ngram_characters", "_duplicate_ngram_characters"):
        exact: Callable[..., int] = getattr(gopher_repetition, name)

        def count(*arguments: Any, exact: Callable[..., int] = exact) -> int:
            counted.append(arguments)
            return exact(*arguments)

        monkeypatch.setattr(gopher_repetition, name, count)
    rule, good = RULES["repetition"][0], real_texts[: len(real_texts) // 2]
    for text in good:
        rule(Page(text))
    assert len(counted) < 2 * len(good), "nine values of n are looked at, few of them are to be counted"


@pytest.mark.parametrize(
    ("length", "reason"), [(0, "empty"), (9, "too_short"), (10, None), (20, None), (21, "too_long")]
)
def test_length_limits_are_inclusive_and_named(length: int, reason: str | None) -> None:
    rule = length_rule(LengthSettings(min_characters=10, max_characters=20))
    assert rule(Page("x" * length)) == reason
