"""p-hop induction: ``2:cabacbda=a``, the symbol that p hops through a random sequence lead to.

One hop goes from a position to the one *after* the latest earlier occurrence of its symbol::

    find(i) = max { j <= i : x_(j-1) = x_i }          answer = x_(find^p(n)),  n the last position

(Sanford et al. 2024, "Transformers, parallel computation, and logarithmic depth", section 4: depth log p is needed and
enough; Saunshi et al. 2025, "Reasoning with latent thoughts: on the power of looped transformers", where a looped model
does as well as one of as many distinct layers.) Here p is written first, then the sequence, and the question is asked
once, at its end. The size is p.

No symbol follows itself: a hop to ``x_(i-1) = x_i`` would stay where it is, and every further hop with it. So each hop
moves back, by ``symbols - 1`` positions in the mean, and a sequence whose chain leaves it on the left is drawn again.

Two problems are the same when sequence and p are.
"""

from __future__ import annotations

from string import ascii_lowercase
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from launch.settings import SettingError
from pretrain.tasks.interface import Lengths, Question, Task


class PHop(Task):
    """Chains of ``min_hops`` to ``max_hops`` hops in sequences of ``length`` symbols."""

    unit: ClassVar[str] = "hops"

    kind: Literal["p_hop"] = "p_hop"
    min_hops: int = Field(1, ge=1)
    max_hops: int = Field(4, ge=1)
    length: int = Field(32, ge=4, le=4096, description="symbols of a sequence")
    symbols: int = Field(4, ge=3, le=26, description="different ones")

    @model_validator(mode="after")
    def _hops_fit(self) -> PHop:
        if self.min_hops > self.max_hops:
            raise SettingError("min_hops", self.min_hops, f"exceeds max_hops = {self.max_hops}")
        if self.max_hops > self.largest_possible:
            raise SettingError(
                "max_hops",
                self.max_hops,
                f"{self.length} symbols, {self.symbols} different ones, hold chains of {self.largest_possible} hops; "
                "raise length",
            )
        return self

    @property
    def alphabet(self) -> str:
        """Ten digits for p, colon, the symbols, equals."""
        return "0123456789:" + ascii_lowercase[: self.symbols] + "="

    @property
    def sizes(self) -> tuple[range, ...]:
        """The number of hops."""
        return tuple(range(hops, hops + 1) for hops in range(self.min_hops, self.max_hops + 1))

    @property
    def largest_possible(self) -> int:
        """The hops whose mean way fits the sequence: for more, most sequences would have to be drawn again."""
        return (self.length - 1) // (self.symbols - 1)

    def lengths(self, size: int) -> Lengths:
        """p, colon, sequence, equals; one symbol."""
        return Lengths(len(str(size)) + self.length + 2, 1)

    def draw(self, rng: np.random.Generator, size: int) -> Question:
        """A sequence with a chain of ``size`` hops from its end."""
        while True:
            first, steps = rng.integers(self.symbols), rng.integers(1, self.symbols, size=self.length - 1)
            numbers = np.cumsum([first, *steps]) % self.symbols
            text = "".join(ascii_lowercase[number] for number in numbers.tolist())
            at = self.length - 1
            for _ in range(size):
                at = text.rfind(text[at], 0, at) + 1
                if at == 0:
                    break
            else:
                prompt = f"{size}:{text}="
                return Question(prompt, text[at], identity=prompt)
