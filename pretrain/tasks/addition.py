"""Addition: ``12+345=357``, any number of operands of a range of digits, character by character.

An n-digit operand is uniform in ``10^(n-1) .. 10^n - 1`` (from 0 for one digit), so no problem of n digits is one of
fewer digits in disguise. All operands of a problem have the same number of digits, which is its difficulty.

The answer is written as people do, most significant digit first, or ``reversed``: least significant first, in the order
in which carries arise, which is easier to learn (Lee et al. 2023, "Teaching arithmetic to small transformers").

Two problems are the same when they add the same numbers, in whatever order.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from launch.settings import SettingError
from pretrain.tasks.interface import Problem, Task

MAX_DIGITS = 18  # of an int64


class Addition(Task):
    """Sums of ``operands`` numbers of ``min_digits`` to ``max_digits`` digits."""

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
    def difficulties(self) -> tuple[str, ...]:
        """The number of digits of each operand."""
        return tuple(f"{digits}_digits" for digits in range(self.min_digits, self.max_digits + 1))

    @property
    def longest(self) -> int:
        """Operands, signs, and the largest sum."""
        largest = self.operands * (10**self.max_digits - 1)
        return self.operands * (self.max_digits + 1) + len(str(largest))

    def draw(self, rng: np.random.Generator) -> Problem:
        """A sum; the number of digits is uniform."""
        digits = int(rng.integers(self.min_digits, self.max_digits, endpoint=True))
        low = 0 if digits == 1 else 10 ** (digits - 1)
        numbers: list[int] = rng.integers(low, 10**digits, size=self.operands).tolist()
        answer = str(sum(numbers))
        return Problem(
            prompt="+".join(map(str, numbers)) + "=",
            answer=answer if self.answer_order == "plain" else answer[::-1],
            difficulty=f"{digits}_digits",
            identity="+".join(map(str, sorted(numbers))),
        )
