"""A data set's tokenizer as transformers' fast tokenizers read one: the same ids for the same text.

A SentencePiece BPE model is written with its spaces as they are, instead of as U+2581 with a rule that turns spaces
into it (the form of ``conversion.py``, which engines know): so a real U+2581 is no piece, falls back to its three
bytes, and comes back as what it was, as in :class:`~data_pipeline.tokenizer.bpe.SentencePieceTokenizer`.

Special tokens are registered, so that ``skip_special_tokens`` and ``eos_token`` mean what people expect, and with
``split_special_tokens`` they are still not looked for: ``</s>`` in a text is ordinary text. A text begins with the end
token, as a document in training begins behind the end of another; ``add_special_tokens=False`` leaves it out.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from data_pipeline.tokenizer.bpe import SPACE_MARK, SentencePieceTokenizer
from data_pipeline.tokenizer.conversion import tokenizer_json
from data_pipeline.tokenizer.hugging_face import HuggingFaceTokenizer
from data_pipeline.tokenizer.interface import Tokenizer
from data_pipeline.tokenizer.self_check import adversarial_texts
from launch.settings import BadInputError, render_text


def fast_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` that gives the ids of ``tokenizer``.

    Raises ``BadInputError`` for a tokenizer that cannot be written so: SentencePiece models that change text, or are no
    BPE with byte fallback.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        values = _with_plain_spaces(tokenizer)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        values = json.loads(tokenizer.definition)
    else:
        raise BadInputError(f"{tokenizer.library}: this tokenizer has no form that transformers reads")
    spellings = special_tokens(tokenizer)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    values["added_tokens"] += [{"id": token_id, "content": text, **flags} for token_id, text in spellings.items()]
    values["added_tokens"].sort(key=lambda token: token["id"])
    end = spellings[tokenizer.end_id]
    begin = {"SpecialToken": {"id": end, "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {end: {"id": end, "ids": [tokenizer.end_id], "tokens": [end]}},
    }
    _require_same_ids(tokenizer, values)
    return values


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The spelling of every special token by its id."""
    return {token_id: tokenizer.piece(token_id) for token_id in sorted(tokenizer.special_ids)}


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``."""
    end = special_tokens(tokenizer)[tokenizer.end_id]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }


def _with_plain_spaces(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(tokenizer_json(tokenizer.model))
    except ValueError as error:
        raise BadInputError(f"{tokenizer.library}: {error}: has no form that transformers reads exactly") from None
    special = tokenizer.special_ids

    def plain(piece: str) -> str:
        return piece.replace(SPACE_MARK, " ")

    model = values["model"]
    model["vocab"] = {
        piece if token_id in special else plain(piece): token_id for piece, token_id in model["vocab"].items()
    }
    model["merges"] = [[plain(left), plain(right)] for left, right in model["merges"]]
    for token in values["added_tokens"]:
        token["content"] = plain(token["content"])
    values["normalizer"] = None
    values["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return values


def _require_same_ids(tokenizer: Tokenizer, values: dict[str, Any]) -> None:
    written = tokenizers.Tokenizer.from_str(json.dumps(values))
    written.encode_special_tokens = True  # what ``split_special_tokens`` sets
    for text in adversarial_texts(tokenizer):
        if written.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise BadInputError(
                f"{tokenizer.library}: {render_text(repr(text))} would get other ids as a fast tokenizer; "
                "export without a tokenizer"
            )
