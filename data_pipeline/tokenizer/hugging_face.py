"""Any Hugging Face ``tokenizer.json`` whose tokens stand for bytes: byte-level BPE, or BPE with byte fallback.

The file is used as it is, but for one thing: its special tokens are taken out of the list that is searched for in the
text. Otherwise a document that mentions ``<|endoftext|>`` would get the id that ends documents. Added tokens that are
not special (runs of spaces, say) stay. Post-processing (a token in front, one behind), truncation and padding are off.

Other models (WordPiece, word lists, Unigram without byte fallback) cannot give every text back and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from launch.settings import BadInputError

SPACE_MARK = "\u2581"


class HuggingFaceTokenizer:
    """A tokenizer of the ``tokenizers`` library."""

    def __init__(self, values: dict[str, Any], end_id: int) -> None:
        specials = [token for token in values.get("added_tokens") or [] if token["special"]]
        self.library = f"tokenizers {tokenizers.__version__}"
        self.special_spellings: list[str] = [token["content"] for token in specials]
        self.special_ids = frozenset(int(token["id"]) for token in specials) | {end_id}
        self.definition = json.dumps(_without_special_tokens(values), ensure_ascii=False)
        self._tokenizer = tokenizers.Tokenizer.from_str(self.definition)
        self._pieces = _pieces(values)
        self._byte_level = "ByteLevel" in json.dumps([values.get("decoder"), values.get("pre_tokenizer")])
        self.vocab_size: int = max(self._pieces) + 1
        self.end_id = end_id

    @classmethod
    def load(cls, path: Path, end: str | int | None) -> HuggingFaceTokenizer:
        """The tokenizer in ``path``; ``end`` is the spelling or the id of the token that ends a document."""
        try:
            values = json.loads(path.read_bytes())
            tokenizers.Tokenizer.from_str(json.dumps(values))
            pieces = _pieces(values)
        except Exception as error:  # tokenizers raises plain Exceptions for files it cannot read
            reason = " ".join(str(error).split())
            raise BadInputError(f"{path}: not a readable Hugging Face tokenizer.json ({reason[:200]})") from None
        model, text = values["model"], json.dumps([values.get("decoder"), values.get("pre_tokenizer")])
        if model.get("type") != "BPE" or not (model.get("byte_fallback") or "ByteLevel" in text):
            raise BadInputError(
                f"{path}: a {model.get('type')} model without byte-level tokens or byte fallback cannot give every "
                "text back; use a byte-level BPE tokenizer"
            )
        if end is None:
            raise BadInputError(
                f"tokenizer.end_token: is required for {path}: name the token that ends a document, such as "
                "<|endoftext|> or </s>"
            )
        if isinstance(end, str):
            ids = [number for number, piece in pieces.items() if piece == end]
            if not ids:
                raise BadInputError(f"tokenizer.end_token = {end!r}: is not a token of {path}")
            end = ids[0]
        if end not in pieces:
            raise BadInputError(f"{path}: has no token {end}, which ends the documents of this data set")
        return cls(values, end)

    def piece(self, token_id: int) -> str:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        return self._pieces[token_id]

    def encode(self, text: str) -> list[int]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        return [item.ids for item in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        ordinary = [token_id for token_id in ids if token_id not in self.special_ids]
        text: str = self._tokenizer.decode(ordinary, skip_special_tokens=False)
        return text

    def byte_lengths(self) -> NDArray[np.int64]:
        """See :class:`~data_pipeline.tokenizer.interface.Tokenizer`."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        added = {int(token["id"]) for token in json.loads(self.definition)["added_tokens"]}
        for token_id, piece in self._pieces.items():
            if token_id in self.special_ids:
                continue
            if token_id in added:
                lengths[token_id] = len(piece.encode())
            elif self._byte_level:
                lengths[token_id] = len(piece)  # one character of its alphabet stands for one byte
            elif len(piece) == 6 and piece.startswith("<0x"):
                lengths[token_id] = 1
            else:
                lengths[token_id] = len(piece.replace(SPACE_MARK, " ").encode())
        return lengths


def _pieces(values: dict[str, Any]) -> dict[int, str]:
    pieces = {int(token_id): piece for piece, token_id in values["model"]["vocab"].items()}
    return pieces | {int(token["id"]): token["content"] for token in values.get("added_tokens") or []}


def _without_special_tokens(values: dict[str, Any]) -> dict[str, Any]:
    ordinary = [token for token in values.get("added_tokens") or [] if not token["special"]]
    return {**values, "added_tokens": ordinary, "post_processor": None, "truncation": None, "padding": None}
