"""The learned judge: reproducible, better than chance, and never opened when it is not what was written."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_pipeline.clean.classifier import (
    TrainingSettings,
    check_classifier,
    description_path,
    quality_score,
    train_classifier,
)
from data_pipeline.clean.settings import ClassifierSettings
from launch.settings import BadInputError

SMALL = TrainingSettings(bits=12, epochs=3)
GOOD = ["harbour", "evening", "captain", "letter", "because", "although", "river", "morning", "silver", "garden"]
BAD = ["buy", "cheap", "click", "now", "free", "offer", "casino", "bonus", "win", "deal"]


def examples(words: list[str], seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices([*words, "the", "and", "of"], k=30)) for _ in range(80)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / "quality.bin"
    description = train_classifier(examples(GOOD, 1), examples(BAD, 2), SMALL, path)
    assert description.accuracy > 0.9
    assert (description.positive, description.negative) == (80, 80)
    return path


def test_new_texts_are_told_apart(model: Path) -> None:
    settings = ClassifierSettings(path=str(model))
    check_classifier(settings)
    assert all(quality_score(text, settings) > 0.5 for text in examples(GOOD, 3))
    assert all(quality_score(text, settings) < 0.5 for text in examples(BAD, 4))
    assert 0 <= quality_score("", settings) <= 1


def test_the_same_examples_give_the_same_bytes_in_any_order(model: Path, tmp_path: Path) -> None:
    train_classifier(examples(GOOD, 1)[::-1], examples(BAD, 2)[::-1], SMALL, tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == model.read_bytes()
    assert description_path(tmp_path / "again.bin").read_bytes() == description_path(model).read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "one bit", "garbage", "empty"])
def test_a_damaged_model_is_one_line_and_is_not_opened(model: Path, tmp_path: Path, damage: str) -> None:
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    broken = {"truncated": content[:-100], "one bit": content, "garbage": b"\xba\x16\x4f\x2f" * 50, "empty": b""}
    path = tmp_path / "model.bin"
    path.write_bytes(broken[damage])
    description_path(path).write_bytes(description_path(model).read_bytes())
    with pytest.raises(BadInputError, match="train it again"):
        check_classifier(ClassifierSettings(path=str(path)))


def test_a_model_without_its_description_is_refused(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with pytest.raises(BadInputError, match=r"model\.bin is missing.*train-classifier"):
        check_classifier(ClassifierSettings(path=str(path)))
    path.write_bytes(model.read_bytes())
    with pytest.raises(BadInputError, match=r"model\.bin\.json is missing"):
        check_classifier(ClassifierSettings(path=str(path)))
    description_path(path).write_text('{"kind": "other"}')
    with pytest.raises(BadInputError, match=r"model\.bin\.json: kind"):
        check_classifier(ClassifierSettings(path=str(path)))


def test_examples_that_cannot_teach_are_named(tmp_path: Path) -> None:
    good, bad = examples(GOOD, 1), examples(BAD, 2)
    with pytest.raises(BadInputError, match="--positive: 1 different examples"):
        train_classifier(good[:1] * 50, bad, SMALL, tmp_path / "m.bin")
    with pytest.raises(BadInputError, match="--negative: 1 documents are positive examples too"):
        train_classifier(good, [*bad, good[0]], SMALL, tmp_path / "m.bin")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="cannot be written"):
        train_classifier(good, bad, SMALL, tmp_path / "file" / "m.bin")
    assert not list(tmp_path.glob("m.bin*"))
