"""Addition: ``12+345=357``, any number of operands of a range of digits, character by character.

An n-digit operand is uniform in ``10^(n-1) .. 10^n - 1`` (from 0 for one digit), so no problem of n digits is one of
fewer digits in disguise. All operands of a problem have the same number of digits, which is its size.

The answer is written as people do, most significant digit first, or ``reversed``: least significant first, in the order
in which carries arise, which is easier to learn (Lee et al. 2023, "Teaching arithmetic to small transformers").

Two problems are the same when they add the same numbers, in whatever order.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from launch.settings import SettingError
from pretrain.tasks.interface import Lengths, Question, Task

MAX_DIGITS = 18  # of an int64


class Addition(Task):
    """Sums of ``operands`` numbers of ``min_digits`` to ``max_digits`` digits."""

    unit: ClassVar[str] = "digits"

    kind: Literal["addition"] = "addition"
    min_digits: int = Field(1, ge=1, le=MAX_DIGITS)
    max_digits: int = Field(3, ge=1, le=MAX_DIGITS)
    operands: int = Field(2, ge=2, le=16)
    answer_order: Literal["plain", "reversed"] = Field("plain", description="most or least significant digit first")

    @model_validator(mode="after")
    def _digits_rise(self) -> Addition:
        if self.min_digits > self.max_digits:
            raise SettingError("min_digits", self.min_digits, f"exceeds max_digits = {self.max_digits}")
        return self

    @property
    def alphabet(self) -> str:
        """Ten digits, plus and equals."""
        return "0123456789+="

    @property
    def sizes(self) -> tuple[range, ...]:
        """The number of digits of each operand."""
        return tuple(range(digits, digits + 1) for digits in range(self.min_digits, self.max_digits + 1))

    @property
    def largest_possible(self) -> int:
        """What the generator's integers hold."""
        return MAX_DIGITS

    def lengths(self, size: int) -> Lengths:
        """Operands and signs; the largest sum."""
        return Lengths(self.operands * (size + 1), len(str(self.operands * (10**size - 1))))

    def draw(self, rng: np.random.Generator, size: int) -> Question:
        """A sum of numbers of ``size`` digits."""
        low = 0 if size == 1 else 10 ** (size - 1)
        numbers: list[int] = rng.integers(low, 10**size, size=self.operands).tolist()
        answer = str(sum(numbers))
        return Question(
            prompt="+".join(map(str, numbers)) + "=",
            answer=answer if self.answer_order == "plain" else answer[::-1],
            identity="+".join(map(str, sorted(numbers))),
        )
