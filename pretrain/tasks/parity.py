"""Parity: ``0110100=1``, whether a string of bits has an odd number of ones. One bit of answer, no steps.

Every bit counts and no part of the string says anything by itself: what transformers of constant depth find hardest
(Hahn 2020, "Theoretical limitations of self-attention"), and length generalisation with them (``strings.py``).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from pretrain.tasks.interface import Lengths, Question
from pretrain.tasks.strings import StringTask, random_string


class Parity(StringTask):
    """Strings of zeros and ones."""

    kind: Literal["parity"] = "parity"

    @property
    def alphabet(self) -> str:
        """Two bits, equals."""
        return "01="

    def lengths(self, size: int) -> Lengths:
        """The string and equals; one bit."""
        return Lengths(size + 1, 1)

    def draw(self, rng: np.random.Generator, size: int) -> Question:
        """A string of ``size`` bits."""
        bits = random_string(rng, "01", size)
        return Question(bits + "=", str(bits.count("1") % 2), identity=bits)
