"""A Hugging Face tokenizer keeps its ids, gives every text back, and never lets text become a special token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline.tokenizer.interface import Tokenizer, load_tokenizer
from data_pipeline.tokenizer.self_check import check_tokenizer
from launch.settings import BadInputError

END = "<|endoftext|>"
LINES = [
    f"The captain of ship {number} wrote a letter, isn't it {number * 7} barrels of water." for number in range(300)
]


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind, trained small, which puts its end token around what it encodes."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END, "<|pad|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(["    "])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 0)])
    tokenizer.enable_truncation(8)
    return tokenizer


@pytest.fixture(scope="module")
def write_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def write(tokenizer: tokenizers.Tokenizer, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
        path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
        values = json.loads(tokenizer.to_str())
        change(values)
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture(scope="module")
def tokenizer(write_tokenizer: Callable[..., Path]) -> Tokenizer:
    return load_tokenizer(write_tokenizer(byte_level()), END)


@settings(max_examples=150)
@given(st.text())
@example(f"one {END}<|pad|> two")
@example("\ufeff  leading\r\n\0 \u2581")
def test_decode_of_encode_is_the_text_and_byte_lengths_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.end_id, *ids, tokenizer.end_id]) == text
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_ids_are_the_librarys_own_without_its_template_and_truncation(tokenizer: Tokenizer) -> None:
    own = byte_level()
    own.no_truncation()
    for text in LINES[:20]:
        assert tokenizer.encode(text) == own.encode(text, add_special_tokens=False).ids
    assert tokenizer.vocab_size == own.get_vocab_size() == 401
    assert tokenizer.end_id == 0


def test_it_passes_the_self_check(tokenizer: Tokenizer) -> None:
    assert check_tokenizer(tokenizer, "t", allow_lossy=False) is None


@pytest.mark.parametrize(
    ("normaliser", "loss"),
    [(normalizers.NFKC(), "comes back as"), (normalizers.Lowercase(), "comes back as")],
)
def test_a_normaliser_that_loses_text_is_refused_or_accepted_by_name(
    write_tokenizer: Callable[..., Path], normaliser: Any, loss: str
) -> None:
    lossy = byte_level()
    lossy.normalizer = normaliser
    loaded = load_tokenizer(write_tokenizer(lossy), END)
    with pytest.raises(BadInputError, match=f"t.json: does not give every text back: .*{loss}.*allow_lossy") as caught:
        check_tokenizer(loaded, "t.json", allow_lossy=False)
    assert "\n" not in str(caught.value)
    said = check_tokenizer(loaded, "t.json", allow_lossy=True)
    assert said is not None
    assert loss in said


def test_a_tokenizer_that_makes_its_end_token_of_text_is_always_refused(write_tokenizer: Callable[..., Path]) -> None:
    def not_special(values: dict[str, Any]) -> None:
        values["added_tokens"][0]["special"] = False

    loaded = load_tokenizer(write_tokenizer(byte_level(), not_special), END)
    for allow_lossy in (False, True):
        with pytest.raises(BadInputError, match="makes its end token of the text"):
            check_tokenizer(loaded, "t.json", allow_lossy)


def test_what_cannot_be_used_is_one_line(write_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    cases = [
        (write_tokenizer(words), "<end>", "a WordLevel model without byte-level tokens"),
        (write_tokenizer(byte_level()), None, r"tokenizer\.end_token: is required"),
        (write_tokenizer(byte_level()), "<nope>", r"tokenizer\.end_token = '<nope>': is not a token"),
        (write_tokenizer(byte_level()), 9999, "has no token 9999"),
        (write_tokenizer(byte_level(), lambda values: values.pop("model")), END, "not a readable Hugging Face"),
        (tmp_path / "missing.json", END, "not a readable Hugging Face"),
        (tmp_path / "tokenizer.txt", END, "neither a SentencePiece model"),
    ]
    (tmp_path / "garbage.json").write_bytes(b"\xff{")
    cases.append((tmp_path / "garbage.json", END, "not a readable Hugging Face"))
    for path, end, message in cases:
        with pytest.raises(BadInputError, match=message) as caught:
            load_tokenizer(path, end)
        assert "\n" not in str(caught.value)
