"""A run's copy of its tokenizer: the same ids, verified, and enough to write text without the data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.dataset.reader import Dataset
from launch.settings import BadInputError
from pretrain.run_tokenizer import keep_tokenizer, load_kept_tokenizer


def test_the_copy_is_the_data_sets_tokenizer(dataset: Dataset, tmp_path: Path) -> None:
    assert load_kept_tokenizer(tmp_path) is None
    keep_tokenizer(dataset, tmp_path)
    kept = load_kept_tokenizer(tmp_path)
    assert kept is not None
    text = "some words, </s> and é"
    assert kept.encode(text) == dataset.tokenizer.encode(text)
    assert (kept.end_id, kept.vocab_size) == (dataset.manifest.end_token_id, dataset.vocab_size)


def test_an_intact_copy_is_left_alone_and_a_damaged_one_is_made_again(dataset: Dataset, tmp_path: Path) -> None:
    keep_tokenizer(dataset, tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer.model"
    before, content = path.stat().st_mtime_ns, path.read_bytes()
    keep_tokenizer(dataset, tmp_path)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(content[:-1] + b"x")
    keep_tokenizer(dataset, tmp_path)
    assert path.read_bytes() == content


def test_another_file_in_its_place_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    keep_tokenizer(dataset, tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BadInputError, match=r"tokenizer\.model: missing, or not the tokenizer that the run was"):
        load_kept_tokenizer(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("file", "../../elsewhere.model"), ("sha256", "0"), ("vocab_size", "many")])
def test_a_description_that_makes_no_sense_is_refused(dataset: Dataset, tmp_path: Path, key: str, value: str) -> None:
    keep_tokenizer(dataset, tmp_path)
    path = tmp_path / "tokenizer" / "description.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(BadInputError, match=r"description\.json"):
        load_kept_tokenizer(tmp_path)
