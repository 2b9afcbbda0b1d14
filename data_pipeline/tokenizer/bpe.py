"""A SentencePiece BPE tokenizer that gives back every text it is given.

Byte fallback covers any character, normalisation is off, no space is added in front, digits stand alone, and a newline
is a piece of its own. One thing is left: SentencePiece spells a space as U+2581 and so decodes a real U+2581 to a
space. :class:`SentencePieceTokenizer` spells that one character in byte pieces, which decode exactly. Special tokens
have ids but no spelling: the text ``</s>`` is five ordinary tokens.

Training is deterministic: one thread (the thread count is stored in the model file), sentences in file order, and a
sample chosen by each document's hash.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from data_pipeline.config import TokenizerSettings
from data_pipeline.inputs.readers import InputFile, read_documents
from data_pipeline.split import text_fraction
from launch.settings import BadInputError

UNKNOWN_ID = 0
END_ID = 1
END_PIECE = "</s>"
SPACE_MARK = "\u2581"


class SentencePieceTokenizer:
    """Text to token ids and back; see :class:`~data_pipeline.tokenizer.interface.Tokenizer`.

    With a model that :func:`train_tokenizer` made, ``decode(encode(text)) == text`` for every text that UTF-8 can hold.
    """

    library = f"sentencepiece {sentencepiece.__version__}"

    def __init__(self, model: bytes, end_id: int | None = None) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Byte pieces that are missing have the unknown piece's id, which decodes to something else: see self_check.py.
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self.vocab_size: int = self._processor.vocab_size()
        self.end_id: int = self._processor.eos_id() if end_id is None else end_id

    @classmethod
    def load(cls, path: Path, end: str | int | None = None) -> SentencePieceTokenizer:
        """The tokenizer in a ``.model`` file; ``end`` ends a document, by default the model's own end token.

        Raises ``BadInputError`` when the file is missing or no such model, or has no such token.
        """
        try:
            tokenizer = cls(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise BadInputError(f"{path}: not a readable SentencePiece model ({error}); prepare it again") from None
        if isinstance(end, str):
            tokenizer.end_id = tokenizer._processor.piece_to_id(end)
            if tokenizer._processor.id_to_piece(tokenizer.end_id) != end:
                raise BadInputError(f"tokenizer.end_token = {end!r}: is not a token of {path}")
        elif end is not None:
            tokenizer.end_id = end
        if not 0 <= tokenizer.end_id < tokenizer.vocab_size:
            raise BadInputError(
                f"tokenizer.end_token: is required for {path}, a model without an end token of its own; name one of "
                "its control tokens"
            )
        return tokenizer

    @property
    def special_spellings(self) -> list[str]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        return [self._processor.id_to_piece(token_id) for token_id in sorted(self.special_ids)]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        ids = range(self.vocab_size)
        special = (i for i in ids if self._processor.is_control(i) or self._processor.is_unknown(i))
        return frozenset(special) | {self.end_id}

    def piece(self, token_id: int) -> str:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        spelling: str = self._processor.id_to_piece(token_id)
        return spelling

    def encode(self, text: str) -> list[int]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        plain = [index for index, text in enumerate(texts) if SPACE_MARK not in text]
        encoded = dict(zip(plain, self._processor.encode([texts[index] for index in plain]), strict=True))
        return [
            encoded[index] if index in encoded else self.encode_marked(text, self._processor.encode)
            for index, text in enumerate(texts)
        ]

    def encode_marked(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Token ids of a text that has U+2581 in it, by an ``encode`` for texts that have none."""
        first, *rest = (encode(part) for part in text.split(SPACE_MARK))
        ids = list(first)
        for part in rest:
            ids += self._space_mark_ids + part
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        text: str = self._processor.decode(list(ids))
        return text

    def byte_lengths(self) -> NDArray[np.int64]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token_id in range(self.vocab_size):
            if self._processor.is_byte(token_id):
                lengths[token_id] = 1
            elif not self._processor.is_control(token_id) and not self._processor.is_unknown(token_id):
                piece = self._processor.id_to_piece(token_id).replace(SPACE_MARK, " ")
                lengths[token_id] = len(piece.encode())
        return lengths


def sample_lines(texts: Iterable[str], fraction: float) -> Iterator[str]:
    """The non-empty lines of about ``fraction`` of the texts, chosen by hash."""
    for text in texts:
        if text_fraction(text, b"tokenizer") < fraction:
            # SentencePiece cannot represent its own space mark, nor U+2585, in training text.
            yield from (line for line in text.split("\n") if line and not set(line) & {SPACE_MARK, "\u2585", "\0"})


def train_tokenizer(texts: Iterable[str], vocab_size: int, control_tokens: Sequence[str] = ()) -> bytes:
    """A SentencePiece model trained on lines of text; ``BadInputError`` when there is too little for ``vocab_size``.

    ``control_tokens`` get the ids 2, 3, ...; no text has them.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 24,
            num_threads=1,
            unk_id=UNKNOWN_ID,
            eos_id=END_ID,
            eos_piece=END_PIECE,
            bos_id=-1,
            pad_id=-1,
            control_symbols=list(control_tokens),
            user_defined_symbols=["\n"],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BadInputError(
            f"tokenizer.vocab_size = {vocab_size}: cannot be reached with this training text ({reason}); "
            "choose a smaller one or add text"
        ) from None
    return model.getvalue()


def train_tokenizer_on_files(
    files: Sequence[InputFile], settings: TokenizerSettings, total_bytes: int, path: Path
) -> None:
    """Train on about ``sample_bytes`` of the documents in ``files`` and write the model to ``path``."""
    fraction = min(settings.sample_bytes / max(total_bytes, 1), 1.0)
    texts = (document.text for file in files for document in read_documents(file))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(train_tokenizer(sample_lines(texts, fraction), settings.vocab_size, settings.control_tokens))
