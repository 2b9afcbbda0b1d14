"""What every tokenizer of a data set can do, whatever library it comes from, and how one is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from launch.settings import BadInputError

SENTENCEPIECE_SUFFIX = ".model"
HUGGING_FACE_SUFFIX = ".json"


class Tokenizer(Protocol):
    """Text to token ids and back.

    Special tokens (the end token, control tokens) have ids but no spelling: text that looks like one is ordinary text.
    """

    library: str
    vocab_size: int
    end_id: int

    @property
    def special_spellings(self) -> list[str]:
        """How special tokens are written in the tokenizer's file; such text must not become their ids."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that no text has."""

    def piece(self, token_id: int) -> str:
        """How the tokenizer's file spells a token."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with no end token."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; faster than one by one."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens have none, and incomplete characters become U+FFFD."""

    def byte_lengths(self) -> NDArray[np.int64]:
        """For each token id the UTF-8 bytes it stands for, (vocab_size,); special tokens stand for none.

        Sums of these over a document's tokens give its size exactly, which is what bits-per-byte divides by.
        """


def load_tokenizer(path: Path, end: str | int | None = None) -> Tokenizer:
    """The tokenizer in a SentencePiece ``.model`` or a Hugging Face ``tokenizer.json``.

    ``end`` is the token that ends a document, by spelling or id; needed for ``.json``, and for a model that names none
    itself. Raises ``BadInputError`` when the file is missing or no tokenizer, or has no such token.
    """
    if path.suffix == HUGGING_FACE_SUFFIX:
        from data_pipeline.tokenizer.hugging_face import HuggingFaceTokenizer

        return HuggingFaceTokenizer.load(path, end)
    if path.suffix == SENTENCEPIECE_SUFFIX:
        from data_pipeline.tokenizer.bpe import SentencePieceTokenizer

        return SentencePieceTokenizer.load(path, end)
    raise BadInputError(f"{path}: is neither a SentencePiece model (.model) nor a Hugging Face tokenizer (.json)")
