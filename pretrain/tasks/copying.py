"""Copy: ``dabba=dabba``, the string again, or ``reversed``: from its end.

Easy within the trained lengths and a test of what a model does beyond them (Zhou et al. 2024, "What algorithms can
transformers learn?": strings with repeated symbols, as here, are the hard case, since a position is not found by its
symbol; ``strings.py``).
"""

from __future__ import annotations

from string import ascii_lowercase
from typing import Literal

import numpy as np
from pydantic import Field

from pretrain.tasks.interface import Lengths, Question
from pretrain.tasks.strings import StringTask, random_string


class Copy(StringTask):
    """Strings over ``symbols`` letters."""

    kind: Literal["copy"] = "copy"
    symbols: int = Field(10, ge=2, le=26, description="different ones")
    answer_order: Literal["plain", "reversed"] = Field("plain", description="the string, or the string backwards")

    @property
    def alphabet(self) -> str:
        """The letters, equals."""
        return ascii_lowercase[: self.symbols] + "="

    def lengths(self, size: int) -> Lengths:
        """The string and equals; the string."""
        return Lengths(size + 1, size)

    def draw(self, rng: np.random.Generator, size: int) -> Question:
        """A string of ``size`` letters."""
        text = random_string(rng, ascii_lowercase[: self.symbols], size)
        answer = text if self.answer_order == "plain" else text[::-1]
        return Question(text + "=", answer, identity=text)
