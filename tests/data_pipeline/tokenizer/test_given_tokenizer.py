"""A preparation with the user's own tokenizer: its ids, checked before any work, noticed when it changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_pipeline.config import DataSettings
from data_pipeline.dataset.reader import open_dataset
from launch.settings import BadInputError

SettingsFor = Callable[..., DataSettings]
RunPipeline = Callable[[DataSettings], list[str]]
END = "<|endoftext|>"


def save_tokenizer(path: Path, vocab_size: int, lossy: bool = False) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lossy:
        tokenizer.normalizer = normalizers.NFKC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(
        ["the river and the mountain have a letter, that is a question of money"] * 5, trainer
    )
    tokenizer.save(str(path))
    return tokenizer


def test_a_hugging_face_tokenizer_is_used_as_it_is_and_published_with_the_data(
    small_corpus: Path, tmp_path: Path, settings_for: SettingsFor, run_pipeline: RunPipeline
) -> None:
    path = tmp_path / "mine.json"
    own = save_tokenizer(path, 290)
    given = {"path": str(path), "end_token": END}
    settings = settings_for(small_corpus, tmp_path / "out", tokenizer=given)
    lines = run_pipeline(settings)
    assert any(line.startswith("encoder    gigatoken") for line in lines)
    dataset = open_dataset(tmp_path / "out", verify=True)
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert dataset.manifest.end_token_id == own.token_to_id(END)
    found = [
        shard.document(i).tolist() for shard in dataset.split("validation").shards for i in range(len(shard.documents))
    ]
    texts = [document["text"] for document in dataset.validation_documents()]
    assert found == [[*own.encode(text).ids, own.token_to_id(END)] for text in texts]
    assert [dataset.tokenizer.decode(ids) for ids in found] == texts

    by_reference = settings_for(small_corpus, tmp_path / "out", tokenizer={**given, "engine": "reference"})
    again = run_pipeline(by_reference)
    for stage in ("tokenizer", "shards", "publish"):
        assert f"{stage:10} already done" in again
    save_tokenizer(path, 295)
    run_pipeline(settings)
    assert open_dataset(tmp_path / "out", verify=True).vocab_size == 295


def test_a_tokenizer_that_cannot_be_used_is_refused_before_any_work(
    small_corpus: Path, tmp_path: Path, settings_for: SettingsFor, run_pipeline: RunPipeline
) -> None:
    save_tokenizer(tmp_path / "lossy.json", 290, lossy=True)
    (tmp_path / "garbage.model").write_bytes(b"garbage")
    (tmp_path / "words.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {}}}))
    for name, message in [
        ("lossy.json", r"lossy\.json: does not give every text back: .*tokenizer\.allow_lossy = true"),
        ("garbage.model", r"garbage\.model: not a readable SentencePiece model"),
        ("words.json", r"words\.json: (not a readable|a WordLevel model)"),
        ("missing.json", r"missing\.json: not a readable"),
        ("tokenizer.vocab", r"tokenizer\.vocab: is neither"),
    ]:
        given = {"path": str(tmp_path / name), "end_token": END}
        with pytest.raises(BadInputError, match=message):
            run_pipeline(settings_for(small_corpus, tmp_path / "out", tokenizer=given))
    assert not (tmp_path / "out").exists()
