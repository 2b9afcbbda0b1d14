"""What a task is: a family of problems, each a prompt and the one right answer, drawn from a generator.

**Splits are fixed.** A problem is held out when a hash of its *identity* falls in the lowest ``validation_fraction``.
The identity is what makes two problems the same for a learner (for addition: the operands, in any order), so neither a
problem nor its mirror image is in both parts. The hash knows nothing of seeds: no run has ever trained on a problem
that another run is scored on.

**Problem n of a stream is a pure function** of (seed, task, split, n): draws come from the counter-based generator
Philox, and a problem of the other split is drawn again.

**A problem has a size** (digits, hops, operators, symbols, empty cells), and a difficulty is one size or a few
neighbouring ones. Training draws its difficulties evenly. Evaluation asks each of them, and the sizes of ``beyond``,
which are larger than any that training has: of those, too, held-out problems only, since another run may train on them.

A task's settings are its fields: it is a section of the configuration (``data.sources[].task``) and the thing itself.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.section import Section
from launch.settings import BadInputError, SettingError

Split = Literal["train", "validation"]
_STREAMS: dict[Split, int] = {"train": 0x7A5C_7241, "validation": 0x7A5C_0E57}
# Problems of the wrong split in a row before the fraction must be wrong rather than the draw unlucky; and how many of a
# difficulty are looked at for held-out ones.
_MOST_DRAWS = 100_000
# Draws in a row that offer nothing new, and two more for each problem seen: then nearly all have been seen.
_IN_VAIN = 200


class Question(NamedTuple):
    """A prompt with one right answer; both are texts over the task's alphabet."""

    prompt: str
    answer: str
    identity: str  # the same text for problems that must not be on both sides of the split


class Problem(NamedTuple):
    """A question, and which of the task's difficulties it is of, trained or beyond."""

    prompt: str
    answer: str
    difficulty: str
    identity: str


class Lengths(NamedTuple):
    """Most characters that problems of a size have."""

    prompt: int
    answer: int


class Task(Section):
    """A family of problems. Subclasses add ``kind: Literal["name"]`` and their own settings."""

    unit: ClassVar[str]
    """What sizes count, in the plural: ``digits``."""

    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of all problems that is held out, by a hash")
    beyond: tuple[int, ...] = Field((), description="sizes above the trained ones that evaluation asks too, rising")

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """Every character of prompts and answers; a character's place is its token id, the end token's id follows."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[range, ...]:
        """The sizes of each difficulty that training has, easiest first."""

    @property
    @abstractmethod
    def largest_possible(self) -> int:
        """The largest size that there are problems of, with these settings."""

    @abstractmethod
    def lengths(self, size: int) -> Lengths:
        """Most characters of a problem of ``size``; they do not fall with the size."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, size: int) -> Question:
        """A question of ``size``, of either split."""

    @model_validator(mode="after")
    def _beyond_is_beyond(self) -> Task:
        previous = self.largest_trained
        for size in self.beyond if previous else ():
            if size <= previous:
                raise SettingError("beyond", self.beyond, f"must rise from above {self.largest_trained} {self.unit}")
            if size > self.largest_possible:
                raise SettingError("beyond", self.beyond, f"at most {self.largest_possible} {self.unit} are possible")
            previous = size
        return self

    @property
    def largest_trained(self) -> int:
        """The largest size that training has; 0 while bounds that contradict one another wait to be refused."""
        return max((sizes[-1] for sizes in self.sizes), default=0)

    @property
    def all_sizes(self) -> tuple[range, ...]:
        """The sizes of each difficulty: the trained ones, then those beyond."""
        return (*self.sizes, *(range(size, size + 1) for size in self.beyond))

    @property
    def difficulties(self) -> tuple[str, ...]:
        """Names of the trained difficulties, easiest first."""
        return tuple(self._name(sizes) for sizes in self.sizes)

    @property
    def difficulties_beyond(self) -> tuple[str, ...]:
        """Names of the difficulties that only evaluation has."""
        return tuple(self._name(range(size, size + 1)) for size in self.beyond)

    def _name(self, sizes: range) -> str:
        return f"{sizes[0]}_{self.unit}" if len(sizes) == 1 else f"{sizes[0]}_to_{sizes[-1]}_{self.unit}"

    @property
    def longest(self) -> int:
        """Most characters a training problem has, prompt and answer together."""
        return sum(self.lengths(self.largest_trained))

    @property
    def longest_asked(self) -> Lengths:
        """Most characters of a problem that evaluation asks."""
        return self.lengths(self.all_sizes[-1][-1])

    @property
    def longest_row(self) -> int:
        """Targets of a row that holds any problem that evaluation asks, and its end token."""
        return sum(self.longest_asked) + 1

    @property
    def key(self) -> str:
        """The same text for the same training problems and the same split, whatever is asked beyond them."""
        return json.dumps(self.model_dump(mode="json", exclude={"beyond"}), sort_keys=True)

    @property
    def asked_key(self) -> str:
        """The same text for the same held-out problems, too."""
        return json.dumps(self.model_dump(mode="json", exclude=None if self.beyond else {"beyond"}), sort_keys=True)

    def is_held_out(self, problem: Problem | Question) -> bool:
        """Whether the problem belongs to the validation split."""
        digest = hashlib.blake2b(problem.identity.encode(), digest_size=8, key=b"task split").digest()
        return int.from_bytes(digest, "big") < self.validation_fraction * 2**64

    def problems(self, split: Split, seed: int, stream: int, offset: int = 0) -> Iterator[Problem]:
        """Endless problems of ``split`` and the trained sizes; the same for the same seed, stream and offset.

        All three are non-negative. Raises ``BadInputError`` when the split has no problem.
        """
        rng = self._generator(split, seed, stream, offset)
        levels = [(self._name(sizes), sizes) for sizes in self.sizes]
        while True:
            for _ in range(_MOST_DRAWS):
                difficulty, sizes = levels[int(rng.integers(len(levels)))]
                question = self.draw(rng, _one_of(rng, sizes))
                if self.is_held_out(question) == (split == "validation"):
                    break
            else:
                raise BadInputError(
                    f"validation_fraction = {self.validation_fraction}: leaves no problem of {self.key} for {split}; "
                    "choose another fraction, or larger problems"
                )
            yield Problem(question.prompt, question.answer, difficulty, question.identity)

    def distinct_problems(self, split: Split, count: int) -> list[Problem]:
        """Up to ``count`` different problems of each difficulty, those beyond training too, the same ones every time.

        A difficulty that has fewer (there are few sums of one digit) gives those it has, as far as they were found
        before draws had nothing new to offer. Raises ``BadInputError`` when it has none.
        """
        return [
            problem for level in range(len(self.all_sizes)) for problem in self._distinct_of_level(split, level, count)
        ]

    def _distinct_of_level(self, split: Split, level: int, count: int) -> list[Problem]:
        rng, sizes = self._generator(split, 0, 0, level), self.all_sizes[level]
        difficulty = self._name(sizes)
        found: dict[str, Problem] = {}
        seen: set[str] = set()  # of either split
        nothing_new = 0
        for _ in range(_MOST_DRAWS):
            question = self.draw(rng, _one_of(rng, sizes))
            nothing_new = nothing_new + 1 if question.prompt in seen else 0
            seen.add(question.prompt)
            if self.is_held_out(question) == (split == "validation"):
                found[question.prompt] = Problem(question.prompt, question.answer, difficulty, question.identity)
            if len(found) == count or nothing_new > _IN_VAIN + 2 * len(seen):
                break
        if not found:
            raise BadInputError(
                f"validation_fraction = {self.validation_fraction}: leaves no problem of {difficulty} of "
                f"{self.key} for {split}; choose another fraction, or larger problems"
            )
        return list(found.values())

    def _generator(self, split: Split, seed: int, stream: int, offset: int) -> np.random.Generator:
        name = int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "big")
        key = np.array([seed ^ (_STREAMS[split] << 32), name], dtype=np.uint64)
        counter = np.array([0, 0, offset, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _one_of(rng: np.random.Generator, sizes: range) -> int:
    return sizes[int(rng.integers(len(sizes)))]
