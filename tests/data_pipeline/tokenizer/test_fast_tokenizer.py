"""A data set's tokenizer as transformers' fast one: the same ids for the whole held-out text and for awkward text."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.config import SplitSettings
from data_pipeline.split import split_of
from data_pipeline.tokenizer.bpe import SPACE_MARK, SentencePieceTokenizer, sample_lines, train_tokenizer
from data_pipeline.tokenizer.fast_tokenizer import fast_tokenizer, special_tokens, tokenizer_config
from data_pipeline.tokenizer.interface import load_tokenizer
from data_pipeline.tokenizer.self_check import adversarial_texts
from launch.settings import BadInputError

PARTS = st.sampled_from([*" \n\t\0aeé日😀", SPACE_MARK, "</s>", "<unk>", "<|user|>", "<0x0A>", "the ", "  ", "77"])


@pytest.fixture(scope="module")
def held_out(repository_root: Path) -> list[str]:
    """The validation documents of the embedded corpus, as ``configs/data/demo.json`` splits it (before cleaning)."""
    settings = SplitSettings.model_validate(
        json.loads((repository_root / "configs/data/demo.json").read_text())["split"]
    )
    texts = []
    for path in sorted((repository_root / "data_pipeline/corpus").glob("*.jsonl.xz")):
        with lzma.open(path, "rt", encoding="utf-8") as file:
            texts += [
                text for text in (json.loads(line)["text"] for line in file) if split_of(text, settings) != "train"
            ]
    return texts


@pytest.fixture(scope="module")
def tokenizer(held_out: list[str]) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer(sample_lines(held_out, 0.5), 700, ["<|user|>"]))


def read_back(values: dict[str, Any]) -> tokenizers.Tokenizer:
    """As transformers reads the file with ``split_special_tokens``."""
    written = tokenizers.Tokenizer.from_str(json.dumps(values))
    written.encode_special_tokens = True
    return written


def test_ids_are_sentencepieces_on_the_whole_validation_text(
    tokenizer: SentencePieceTokenizer, fast: tokenizers.Tokenizer, held_out: list[str]
) -> None:
    assert sum(map(len, held_out)) > 200_000
    library = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    for text in held_out:
        ids = fast.encode(text, add_special_tokens=False).ids
        assert SPACE_MARK not in text
        assert ids == library.encode(text)
        assert fast.decode(ids) == text


@pytest.fixture(scope="module")
def fast(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    return read_back(fast_tokenizer(tokenizer))


@given(st.text() | st.lists(PARTS, max_size=30).map("".join))
def test_ids_and_text_are_the_tokenizers_for_any_text(
    tokenizer: SentencePieceTokenizer, fast: tokenizers.Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert fast.encode(text, add_special_tokens=False).ids == ids
    assert fast.encode(text).ids == [tokenizer.end_id, *ids]
    assert fast.decode(ids) == text
    assert fast.decode([tokenizer.end_id, *ids], skip_special_tokens=True) == text


def test_special_tokens_have_their_spelling(tokenizer: SentencePieceTokenizer) -> None:
    assert special_tokens(tokenizer) == {0: "<unk>", 1: "</s>", 2: "<|user|>"}
    values = tokenizer_config(tokenizer, 64)
    assert (values["eos_token"], values["split_special_tokens"], values["model_max_length"]) == ("</s>", True, 64)


def test_a_hugging_face_tokenizer_keeps_its_ids(tmp_path: Path, held_out: list[str]) -> None:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.train_from_iterator(held_out[:5], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", "<|end|>")
    fast = read_back(fast_tokenizer(tokenizer))
    for text in [*held_out[:20], *adversarial_texts(tokenizer)]:
        assert fast.encode(text).ids == [tokenizer.end_id, *tokenizer.encode(text)]


def test_a_model_that_changes_text_has_no_such_form(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some words to train on\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "changing"),
        model_type="bpe",
        vocab_size=280,
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "changing.model")
    with pytest.raises(BadInputError, match="a model that changes text before it splits it"):
        fast_tokenizer(tokenizer)
