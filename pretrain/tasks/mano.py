"""Mano: the value of an arithmetic expression modulo m, in prefix notation: ``-*3a+b7=4``. Answer only, no steps.

Mental arithmetic over a tree (Allen-Zhu 2025, "Physics of language models, part 4.1", task Mano): operators ``+ - *``,
numbers modulo 23, one token each (digits, then lower-case letters). The size is the number of operators; the tree is
uniform among those with that many, operators and numbers are uniform.

Two problems are the same when they are one expression up to the order of what is added or multiplied.
"""

from __future__ import annotations

from itertools import accumulate
from string import ascii_lowercase, digits
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from launch.settings import SettingError
from pretrain.tasks.interface import Lengths, Question, Task

NUMBERS = digits + ascii_lowercase
OPERATORS = "+-*"
MAX_OPERATORS = 256


class Mano(Task):
    """Expressions of ``min_operators`` to ``max_operators`` operators."""

    unit: ClassVar[str] = "operators"

    kind: Literal["mano"] = "mano"
    min_operators: int = Field(1, ge=1, le=MAX_OPERATORS)
    max_operators: int = Field(6, ge=1, le=MAX_OPERATORS)
    modulus: int = Field(23, ge=2, le=len(NUMBERS))

    @model_validator(mode="after")
    def _operators_rise(self) -> Mano:
        if self.min_operators > self.max_operators:
            raise SettingError("min_operators", self.min_operators, f"exceeds max_operators = {self.max_operators}")
        return self

    @property
    def alphabet(self) -> str:
        """The numbers, three operators, equals."""
        return NUMBERS[: self.modulus] + OPERATORS + "="

    @property
    def sizes(self) -> tuple[range, ...]:
        """The number of operators."""
        return tuple(range(count, count + 1) for count in range(self.min_operators, self.max_operators + 1))

    @property
    def largest_possible(self) -> int:
        """As many as the settings take."""
        return MAX_OPERATORS

    def lengths(self, size: int) -> Lengths:
        """Operators, one number more, equals; one number."""
        return Lengths(2 * size + 2, 1)

    def draw(self, rng: np.random.Generator, size: int) -> Question:
        """An expression of ``size`` operators."""
        shape = _prefix_shape(rng, size)
        operators = iter(rng.integers(len(OPERATORS), size=size).tolist())
        numbers = iter(rng.integers(self.modulus, size=size + 1).tolist())
        text = "".join(OPERATORS[next(operators)] if is_operator else NUMBERS[next(numbers)] for is_operator in shape)
        value, canonical = self._evaluate(text)
        return Question(text + "=", NUMBERS[value], canonical)

    def _evaluate(self, text: str) -> tuple[int, str]:
        """The value of a prefix expression, and the same expression with the operands of + and * in order."""
        stack: list[tuple[int, str]] = []
        for character in reversed(text):
            if character not in OPERATORS:
                stack.append((NUMBERS.index(character), character))
                continue
            (left, left_text), (right, right_text) = stack.pop(), stack.pop()
            if character == "-":
                value = left - right
            else:
                value = left + right if character == "+" else left * right
                left_text, right_text = sorted((left_text, right_text))
            stack.append((value % self.modulus, character + left_text + right_text))
        ((result, canonical),) = stack
        return result, canonical


def _prefix_shape(rng: np.random.Generator, size: int) -> list[bool]:
    """Where the ``size`` operators stand in a uniform random prefix expression.

    Cycle lemma (Dvoretzky and Motzkin 1947): of the 2n + 1 rotations of a word of n operators (+1) and n + 1 numbers
    (-1) exactly one is a prefix expression, the one that starts after the first minimum of the running sum.
    """
    word = [number < size for number in rng.permutation(2 * size + 1).tolist()]
    running = list(accumulate(1 if is_operator else -1 for is_operator in word))
    start = running.index(min(running)) + 1
    return word[start:] + word[:start]
