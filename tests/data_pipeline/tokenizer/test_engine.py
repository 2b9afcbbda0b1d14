"""Fast engines give the reference's token ids, or are not used; which one is used changes no byte."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_pipeline.dataset.manifest import SHARD_SUFFIXES
from data_pipeline.dataset.shards import open_shard, shard_file
from data_pipeline.dataset.tokenise import WriteTokens
from data_pipeline.inputs.readers import InputFile
from data_pipeline.tokenizer import engine
from data_pipeline.tokenizer.bpe import SPACE_MARK, SentencePieceTokenizer, train_tokenizer
from data_pipeline.tokenizer.conversion import tokenizer_json
from data_pipeline.tokenizer.engine import choose_engine, create_engine
from data_pipeline.tokenizer.interface import Tokenizer, load_tokenizer
from data_pipeline.tokenizer.self_check import adversarial_texts, check_tokenizer, sample_texts
from launch.settings import BadInputError

CONTROL = ("<|user|>", "letter")
LINES = [
    f"The captain of ship {number} wrote a letter </s> to the harbour about {number * 7} barrels of water <|user|>."
    for number in range(300)
]
PARTS = st.sampled_from(
    [*" \n\t\0aeé日😀", SPACE_MARK, "</s>", "<unk>", "<|user|>", "letter", "<0x0A>", "the ", "  ", "77"]
)
TEXTS = st.lists(st.text(max_size=30) | st.lists(PARTS, max_size=30).map("".join), max_size=8)


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(LINES, 380, CONTROL)


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    tokenizer.save(str(path))
    return load_tokenizer(path, "</s>")


@settings(max_examples=200)
@given(TEXTS)
def test_every_engine_gives_sentencepieces_ids(
    sentencepiece_tokenizer: SentencePieceTokenizer, texts: list[str]
) -> None:
    expected = sentencepiece_tokenizer.encode_batch(texts)
    for name in engine.FASTEST_FIRST:
        assert [ids.tolist() for ids in create_engine(name, sentencepiece_tokenizer)(texts)] == expected, name


@settings(max_examples=100)
@given(TEXTS)
def test_gigatoken_gives_the_tokenizers_librarys_ids(byte_level_tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = byte_level_tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in create_engine("gigatoken", byte_level_tokenizer)(texts)] == expected


def test_the_converted_model_is_the_same_function_in_a_third_library(
    sentencepiece_tokenizer: SentencePieceTokenizer,
) -> None:
    converted = tokenizers.Tokenizer.from_str(tokenizer_json(sentencepiece_tokenizer.model))
    for text in adversarial_texts(sentencepiece_tokenizer):
        plain = text.replace(SPACE_MARK, " ")
        assert converted.encode(plain, add_special_tokens=False).ids == sentencepiece_tokenizer.encode(plain)


def test_control_tokens_are_reserved_and_no_text_has_them(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    assert sentencepiece_tokenizer.special_spellings == ["<unk>", "</s>", *CONTROL]
    assert sentencepiece_tokenizer.special_ids == {0, 1, 2, 3}
    for name in engine.FASTEST_FIRST:
        for ids in create_engine(name, sentencepiece_tokenizer)(["<|user|>", "a letter </s>", "letter"]):
            assert not {0, 1, 2, 3} & set(ids.tolist())
    assert check_tokenizer(sentencepiece_tokenizer, "t", allow_lossy=False) is None


def test_a_control_token_that_ordinary_pieces_spell_is_still_not_made_of_text() -> None:
    spelt = ("Theuser", "userhip")
    tokenizer = SentencePieceTokenizer(train_tokenizer(LINES, 380, spelt))
    for control, pieces in zip(spelt, (("The", "user"), ("user", "hip")), strict=True):
        expected = tokenizer.encode(control)
        assert [tokenizer.decode([token]) for token in expected] == list(pieces)
        for name in ("gigatoken", "kitoken"):
            assert create_engine(name, tokenizer)([control])[0].tolist() == expected


def test_the_fastest_engine_that_agrees_is_chosen_and_named(sentencepiece_tokenizer: SentencePieceTokenizer) -> None:
    texts = adversarial_texts(sentencepiece_tokenizer)
    choice = choose_engine(sentencepiece_tokenizer, texts)
    assert (choice.name, choice.texts, choice.refused) == ("gigatoken", len(texts), {})
    assert choice.describe().startswith("gigatoken 0.")
    assert choose_engine(sentencepiece_tokenizer, texts, "kitoken").name == "kitoken"
    reference = choose_engine(sentencepiece_tokenizer, texts, "reference")
    assert reference.describe() == f"sentencepiece {sentencepiece.__version__}"


def test_engines_that_differ_fail_or_panic_are_refused_with_the_reason(
    sentencepiece_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RustPanic(BaseException):
        """What a panic looks like from Python."""

    def panics(_: Any) -> Any:
        raise RustPanic("index out of\nbounds")

    def differs(tokenizer: Tokenizer) -> Any:
        return lambda text: np.asarray([*tokenizer.encode(text), 5] if "😀" in text else tokenizer.encode(text))

    monkeypatch.setattr(engine, "_gigatoken", panics)
    monkeypatch.setattr(engine, "_kitoken", differs)
    choice = choose_engine(sentencepiece_tokenizer, ["fine", "not 😀"])
    assert choice.name == "reference"
    assert choice.refused == {"gigatoken": "RustPanic: index out of bounds", "kitoken": "other token ids for 'not 😀'"}
    assert choice.describe().startswith("sentencepiece 0.")
    assert "not kitoken: other token ids" in choice.describe()
    assert choose_engine(sentencepiece_tokenizer, ["fine"]).name == "kitoken"


def train_other(kind: str, **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, model_type=kind, vocab_size=420, minloglevel=2, **options
    )
    return model.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_model_that_changes_text_is_not_converted_and_is_refused_unless_accepted(kind: str, tmp_path: Path) -> None:
    (tmp_path / "m.model").write_bytes(train_other(kind, byte_fallback=True))
    tokenizer = load_tokenizer(tmp_path / "m.model")
    with pytest.raises(ValueError, match=r"not a BPE model|changes text"):
        tokenizer_json((tmp_path / "m.model").read_bytes())
    choice = choose_engine(tokenizer, adversarial_texts(tokenizer))
    assert choice.name in ("kitoken", "reference")
    assert "gigatoken" in choice.refused
    with pytest.raises(BadInputError, match="does not give every text back"):
        check_tokenizer(tokenizer, "m.model", allow_lossy=False)


def test_a_lossless_unigram_model_is_accepted(tmp_path: Path) -> None:
    options = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "eos_id": -1,
        "bos_id": -1,
        "control_symbols": ["<end>"],
    }
    path = tmp_path / "m.model"
    path.write_bytes(train_other("unigram", **options))
    with pytest.raises(BadInputError, match=r"tokenizer\.end_token: is required"):
        load_tokenizer(path)
    with pytest.raises(BadInputError, match=r"tokenizer\.end_token = '<stop>': is not a token"):
        load_tokenizer(path, "<stop>")
    tokenizer = load_tokenizer(path, "<end>")
    assert tokenizer.end_id == 1
    assert check_tokenizer(tokenizer, "m.model", allow_lossy=False) is None


def documents() -> list[Document]:
    generator = random.Random(1)
    texts = ["", "</s>", f"{SPACE_MARK} marked {SPACE_MARK}", *LINES, "".join(generator.choices("ab \n😀", k=4000))]
    origins = ({"source": 0, "file": 3, "position": number} for number in range(len(texts)))
    return [
        Document(text, str(number), metadata={"domain": "ab"[number % 2], "origin": origin})
        for number, (text, origin) in enumerate(zip(texts, origins, strict=True))
    ]


def test_the_engine_changes_no_byte_of_a_piece(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(model)
    written = {}
    for name in engine.FASTEST_FIRST:
        step = WriteTokens(tmp_path / name, tmp_path / "t.model", 1, name, ["a", "b"])
        assert len(list(step.run(iter(documents()), rank=4, world_size=9))) == len(documents())
        path = tmp_path / name / "00004.bin"
        written[name] = [shard_file(path, kind).read_bytes() for kind in SHARD_SUFFIXES]
    assert written["gigatoken"] == written["kitoken"] == written["reference"]
    shard = open_shard(tmp_path / "reference" / "00004.bin")
    tokenizer = SentencePieceTokenizer(model)
    for number, document in enumerate(documents()):
        assert shard.document(number).tolist() == [*tokenizer.encode(document.text), 1]
        assert shard.utf8_bytes[number] == len(document.text.encode())
        assert shard.domain_ids[number] == number % 2
        assert shard.origins[number].item() == (0, 3, number)


def test_an_engine_that_goes_wrong_on_the_corpus_stops_the_run(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(tokenizer: Tokenizer) -> Any:
        return lambda text: np.asarray([*tokenizer.encode(text), 7], dtype=np.uint32)

    monkeypatch.setattr(engine, "_gigatoken", wrong)
    (tmp_path / "t.model").write_bytes(model)
    step = WriteTokens(tmp_path / "out", tmp_path / "t.model", 1, "gigatoken", ["a", "b"])
    with pytest.raises(BadInputError, match=r"document '0': gigatoken gives other .*tokenizer\.engine=reference"):
        list(step.run(iter(documents())))
    with pytest.raises(BadInputError, match="cannot be read"):
        open_shard(tmp_path / "out" / "00000.bin")


def test_a_piece_without_documents_is_written_too(model: bytes, tmp_path: Path) -> None:
    from data_pipeline.dataset.shards import read_description

    (tmp_path / "t.model").write_bytes(model)
    list(WriteTokens(tmp_path, tmp_path / "t.model", 1, "reference", ["a"]).run(iter([]), rank=2))
    assert read_description(tmp_path / "00002.bin").entry.documents == 0


def test_the_sample_is_spread_over_the_files_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[InputFile] = []
    for number in range(9):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(f'{{"text": "{number} {line}"}}\n' for line in range(50)))
        files.append(InputFile(path))
    monkeypatch.setattr("data_pipeline.tokenizer.self_check.SAMPLE_FILES", 3)
    monkeypatch.setattr("data_pipeline.tokenizer.self_check.SAMPLE_CHARACTERS", 60)
    texts: Sequence[str] = sample_texts(files)
    assert {text[0] for text in texts} == {"0", "3", "6"}
    assert 60 <= sum(map(len, texts)) < 80
