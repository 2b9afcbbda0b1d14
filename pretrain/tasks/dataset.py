"""What a task has where a prepared data set has a folder: vocabulary, tokenizer, fingerprint, held-out problems.

A character is a token; its id is its place in the task's alphabet, and the end token follows. The tokenizer is written
as an ordinary ``tokenizer.json`` (byte-level BPE without merges), so a run keeps it, text is generated and models are
exported as with any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer.hugging_face import HuggingFaceTokenizer
from launch.settings import BadInputError
from pretrain.tasks.interface import Problem, Task

END_TOKEN = "</s>"
_VERSION = 1  # of how problems become rows; part of the fingerprint


class CharacterTokenizer(HuggingFaceTokenizer):
    """One token a character of a small alphabet; text with any other character is refused."""

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``. Raises ``BadInputError`` for a character outside the alphabet."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            known = "".join(self._ids)
            raise BadInputError(f"{error.args[0]!r}: is none of this task's characters, {known}") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; errors as for :meth:`encode`."""
        return [self.encode(text) for text in texts]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: number for number, piece in self._pieces.items() if number != self.end_id}


def tokenizer_definition(alphabet: str) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` over single-byte characters ``alphabet``, and the end token behind them."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {
        "id": len(alphabet),
        "content": END_TOKEN,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {character: number for number, character in enumerate(alphabet)},
            "merges": [],
        },
    }


@dataclass(frozen=True)
class TaskDataset:
    """A task and what its rows are made with."""

    task: Task

    @property
    def folder(self) -> Path:
        """What messages call it; no such folder exists."""
        return Path(f"task {self.task.asked_key}")

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the training problems, their split and their tokens."""
        return hashlib.sha256(f"{_VERSION}/{self.task.key}/{self.tokenizer_sha256}".encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The characters and the end token."""
        return len(self.task.alphabet) + 1

    @property
    def end_token_id(self) -> int:
        """The last id."""
        return len(self.task.alphabet)

    @property
    def domains(self) -> tuple[str, ...]:
        """The task's difficulties, those beyond training last."""
        return (*self.task.difficulties, *self.task.difficulties_beyond)

    @cached_property
    def tokenizer(self) -> HuggingFaceTokenizer:
        """One token a character."""
        return CharacterTokenizer(tokenizer_definition(self.task.alphabet), self.end_token_id)

    @cached_property
    def tokenizer_bytes(self) -> bytes:
        """The tokenizer's file."""
        return json.dumps(tokenizer_definition(self.task.alphabet), ensure_ascii=True, indent=2).encode()

    @property
    def tokenizer_suffix(self) -> str:
        """Of the tokenizer's file."""
        return ".json"

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Of the tokenizer's file: tasks with the same one may be mixed."""
        return hashlib.sha256(self.tokenizer_bytes).hexdigest()

    def held_out_problems(self, count: int) -> list[Problem]:
        """Up to ``count`` held-out problems of each difficulty, the same ones whatever the run; never none of one."""
        return self.task.distinct_problems("validation", count)
