"""The tokenizer gives back every text, deterministically, and never turns text into control tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer.bpe import SPACE_MARK, SentencePieceTokenizer, sample_lines, train_tokenizer
from launch.settings import BadInputError

LINES = [
    f"The captain of ship {number} wrote a letter to the harbour about {number * 7} barrels of water and <s> marks."
    for number in range(200)
]
AWKWARD = st.text(alphabet=st.sampled_from([*" \n\t\r\0</s>ab1", SPACE_MARK, "\u2585", "\u2047", "é", "日", "😀"]))


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer(LINES, 400))


@settings(max_examples=300)
@given(st.one_of(st.text(), AWKWARD))
@example("  leading, trailing  ")
@example("</s><s><unk><pad><0x0A>")
@example("a\0b")
@example("\ufeff\r\n\u2028")
@example(f"{SPACE_MARK}{SPACE_MARK} x{SPACE_MARK}")
def test_decode_of_encode_is_the_text_and_byte_lengths_add_up(tokenizer: SentencePieceTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.byte_lengths()[ids].sum()) == len(text.encode())
    assert tokenizer.end_id not in ids


@given(st.lists(AWKWARD, max_size=6))
def test_a_batch_is_encoded_as_each_text_alone(tokenizer: SentencePieceTokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_digits_and_newlines_stand_alone(tokenizer: SentencePieceTokenizer) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2026")] == ["2", "0", "2", "6"]
    assert len(tokenizer.encode("\n\n")) == 2


def test_training_is_deterministic_and_reaches_the_vocabulary(tokenizer: SentencePieceTokenizer) -> None:
    assert train_tokenizer(LINES, 400) == train_tokenizer(LINES, 400)
    assert tokenizer.vocab_size == 400


def test_an_unreachable_vocabulary_is_one_line_with_the_setting() -> None:
    with pytest.raises(BadInputError, match=r"tokenizer\.vocab_size = 5000: cannot be reached") as caught:
        train_tokenizer(["a b"], 5000)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"nothing")
    with pytest.raises(BadInputError, match=r"t\.model: not a readable SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path / "t.model")
    with pytest.raises(BadInputError, match=r"u\.model"):
        SentencePieceTokenizer.load(tmp_path / "u.model")


def test_the_sample_is_about_the_fraction_and_does_not_depend_on_order() -> None:
    half = set(sample_lines(LINES, 0.5))
    assert half == set(sample_lines(reversed(LINES), 0.5))
    assert 60 < len(half) < 140
    assert set(sample_lines(LINES, 1.0)) == set(LINES)
