"""A SentencePiece BPE model as a Hugging Face ``tokenizer.json``: the form in which fast engines read it.

SentencePiece merges the adjacent pair whose joint piece has the best score, wherever it came from; the other form lists
pairs in order. So every way to split a piece into two pieces becomes a merge, in the order of the piece's score.

Two things keep text apart from control: only ordinary pieces take part in merges, and control, unknown and byte pieces
are not registered as text to look for, so ``</s>`` in a document is made of ordinary tokens. Pieces the user defined
(the newline) are registered, because SentencePiece cuts them out before it merges.
"""

from __future__ import annotations

import json

from sentencepiece import sentencepiece_model_pb2

from data_pipeline.tokenizer.bpe import SPACE_MARK


def tokenizer_json(model: bytes) -> str:
    """The SentencePiece ``model`` as ``tokenizer.json``.

    It is the same function on text without U+2581 for BPE with byte fallback and identity normalisation;
    ``self_check.py`` finds out whether it is. Raises ``ValueError`` for other kinds of models.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normaliser = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE or not trainer.byte_fallback:
        raise ValueError("not a BPE model with byte fallback")
    if normaliser.precompiled_charsmap or normaliser.add_dummy_prefix or normaliser.remove_extra_whitespaces:
        raise ValueError("a model that changes text before it splits it")
    ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    ordinary = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    merges = sorted(
        (-score, ids[piece[:cut]], ids[piece[cut:]])
        for piece, score in ordinary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    user_defined = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[piece], "content": piece, **flags} for piece in user_defined],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": trainer.unk_piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": [[proto.pieces[left].piece, proto.pieces[right].piece] for _, left, right in merges],
        },
    }
    return json.dumps(values, ensure_ascii=False)
