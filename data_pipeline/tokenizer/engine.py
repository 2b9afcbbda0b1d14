"""The fastest encoder whose token ids are the tokenizer's own.

``reference`` is the library that owns the tokenizer: SentencePiece, or Hugging Face's ``tokenizers``. Others read the
same file and encode faster (tests/benchmarks/tokenise.py: SentencePiece 4, kitoken 13, gigatoken 55 MB/s). They are
young, so each is believed only after it gave the reference's ids on real documents and on adversarial text
(``self_check.py``), and is watched while it works (``dataset/tokenise.py``). Then the choice cannot change a byte, and
no stage's key depends on it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer.bpe import SPACE_MARK, SentencePieceTokenizer
from data_pipeline.tokenizer.hugging_face import HuggingFaceTokenizer
from data_pipeline.tokenizer.interface import Tokenizer

Encode = Callable[[Sequence[str]], list[NDArray[Any]]]
"""Texts to token ids, an integer array for each."""

REFERENCE = "reference"
FASTEST_FIRST = ("gigatoken", "kitoken", REFERENCE)


@dataclass(frozen=True)
class EngineChoice:
    """The engine that will encode, and how that was found out. ``refused``: faster ones, and why not."""

    name: str
    version: str
    texts: int
    utf8_bytes: int
    refused: dict[str, str]

    def describe(self) -> str:
        """One line for people."""
        reasons = "".join(f"; not {name}: {reason}" for name, reason in self.refused.items())
        if self.name == REFERENCE:
            return f"{self.version}{reasons}"
        return f"{self.version}: equal token ids on {self.texts:,} texts ({self.utf8_bytes / 1e6:.1f} MB){reasons}"


def create_engine(name: str, tokenizer: Tokenizer) -> Encode:
    """The engine called ``name`` for ``tokenizer``.

    Raises ``ValueError`` when it cannot read such a tokenizer, and whatever its library raises.
    """
    if name == REFERENCE:
        return lambda texts: [np.asarray(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)]
    encode = _gigatoken(tokenizer) if name == "gigatoken" else _kitoken(tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        return lambda texts: [_with_marks(tokenizer, text, encode) for text in texts]
    return lambda texts: [encode(text) for text in texts]


def _with_marks(tokenizer: SentencePieceTokenizer, text: str, encode: Callable[[str], NDArray[Any]]) -> NDArray[Any]:
    if SPACE_MARK not in text:
        return encode(text)
    return np.asarray(tokenizer.encode_marked(text, lambda part: encode(part).tolist()), dtype=np.uint32)


def _gigatoken(tokenizer: Tokenizer) -> Callable[[str], NDArray[Any]]:
    import gigatoken

    from data_pipeline.tokenizer.conversion import tokenizer_json

    if isinstance(tokenizer, SentencePieceTokenizer):
        definition = tokenizer_json(tokenizer.model)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        definition = tokenizer.definition
    else:
        raise ValueError(f"cannot read a {type(tokenizer).__name__}")
    encode: Callable[[str], NDArray[Any]] = gigatoken.Tokenizer.from_json(definition).encode
    return encode


def _kitoken(tokenizer: Tokenizer) -> Callable[[str], NDArray[Any]]:
    import kitoken

    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise ValueError(f"cannot read a {type(tokenizer).__name__}")
    encoder = kitoken.Kitoken.from_sentencepiece(tokenizer.model)
    return lambda text: np.asarray(encoder.encode(text), dtype=np.uint32)


def choose_engine(tokenizer: Tokenizer, texts: Sequence[str], wanted: str = "auto") -> EngineChoice:
    """The first of ``FASTEST_FIRST`` that encodes every one of ``texts`` as the tokenizer does; or the ``wanted`` one.

    The reference always does, so a wanted engine that fails is replaced by it, and the choice says so.
    """
    expected = [np.asarray(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)] if texts else []
    refused: dict[str, str] = {}
    for name in FASTEST_FIRST if wanted == "auto" else (wanted, REFERENCE):
        problem = None if name == REFERENCE else _problem(name, tokenizer, texts, expected)
        if problem is None:
            version = tokenizer.library if name == REFERENCE else f"{name} {importlib.metadata.version(name)}"
            size = sum(len(text.encode()) for text in texts)
            return EngineChoice(name, version, len(texts), size, refused)
        refused[name] = problem
    raise AssertionError("the reference is never refused")


def _problem(name: str, tokenizer: Tokenizer, texts: Sequence[str], expected: Sequence[NDArray[Any]]) -> str | None:
    """Why an engine must not be used; None when it may."""
    try:
        found = create_engine(name, tokenizer)(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    for text, ids, right in zip(texts, found, expected, strict=True):
        if not np.array_equal(ids, right):
            return f"other token ids for {text[:40]!r}"
    return None
