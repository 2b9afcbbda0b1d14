"""What tasks over strings have in common: lengths, trained ones in a few groups, and lengths beyond training.

The classical question to a sequence model that has learnt an algorithm rather than a table: does it work on strings
longer than any it was trained on (Anil et al. 2022, "Exploring length generalization in large language models")? Of
looped transformers it is reported that with depth in proportion to the length they do (Fan et al. 2024, "Looped
transformers for length generalization"); hence lengths in ``beyond``, and depths beyond training beside them.

The size is the length. A string is uniform among those of its length, and two problems are the same when their strings
are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from launch.settings import SettingError
from pretrain.tasks.interface import Task

MAX_LENGTH = 4096


class StringTask(Task):
    """Strings of ``min_length`` to ``max_length`` symbols, reported in ``length_groups`` ranges of lengths."""

    unit: ClassVar[str] = "symbols"

    min_length: int = Field(1, ge=1, le=MAX_LENGTH)
    max_length: int = Field(16, ge=1, le=MAX_LENGTH)
    length_groups: int = Field(4, ge=1, description="difficulties that the trained lengths are divided into, evenly")

    @model_validator(mode="after")
    def _lengths_rise(self) -> StringTask:
        if self.min_length > self.max_length:
            raise SettingError("min_length", self.min_length, f"exceeds max_length = {self.max_length}")
        if self.length_groups > self.max_length - self.min_length + 1:
            raise SettingError(
                "length_groups", self.length_groups, f"more than the lengths {self.min_length} to {self.max_length}"
            )
        return self

    @property
    def sizes(self) -> tuple[range, ...]:
        """The lengths of each group; where they do not divide evenly, the last groups have one more."""
        lengths = range(self.min_length, self.max_length + 1)
        edges = [len(lengths) * number // self.length_groups for number in range(self.length_groups + 1)]
        return tuple(lengths[start:end] for start, end in pairwise(edges) if start < end)

    @property
    def largest_possible(self) -> int:
        """As long as the settings take."""
        return MAX_LENGTH


def random_string(rng: np.random.Generator, symbols: str, length: int) -> str:
    """``length`` symbols, each uniform."""
    return "".join(symbols[number] for number in rng.integers(len(symbols), size=length).tolist())
