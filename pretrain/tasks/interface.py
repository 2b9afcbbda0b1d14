"""What a task is: a family of problems, each a prompt and the one right answer, drawn from a generator.

**Splits are fixed.** A problem is held out when a hash of its *identity* falls in the lowest ``validation_fraction``.
The identity is what makes two problems the same for a learner (for addition: the operands, in any order), so neither a
problem nor its mirror image is in both parts. The hash knows nothing of seeds: no run has ever trained on a problem
that another run is scored on.

**Problem n of a stream is a pure function** of (seed, task, split, n): draws come from the counter-based generator
Philox, and a problem of the other split is drawn again.

A task's settings are its fields: it is a section of the configuration (``data.sources[].task``) and the thing itself.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from data_pipeline.section import Section

Split = Literal["train", "validation"]
_STREAMS: dict[Split, int] = {"train": 0x7A5C_7241, "validation": 0x7A5C_0E57}
# Problems of the wrong split in a row before the fraction must be wrong rather than the draw unlucky.
_MOST_DRAWS = 100_000
_IN_VAIN = 100


class Problem(NamedTuple):
    """A question with one right answer; both are texts over the task's alphabet."""

    prompt: str
    answer: str
    difficulty: str  # one of the task's difficulties
    identity: str  # the same text for problems that must not be on both sides of the split


class Task(Section):
    """A family of problems. Subclasses add ``kind: Literal["name"]`` and their own settings."""

    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of all problems that is held out, by a hash")

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """Every character of prompts and answers; a character's place is its token id, the end token's id follows."""

    @property
    @abstractmethod
    def difficulties(self) -> tuple[str, ...]:
        """Names of the difficulties, easiest first; evaluation reports each."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Most characters a problem has, prompt and answer together."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Problem:
        """A problem, of either split."""

    @property
    def key(self) -> str:
        """The same text for the same family of problems and the same split."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def is_held_out(self, problem: Problem) -> bool:
        """Whether the problem belongs to the validation split."""
        digest = hashlib.blake2b(problem.identity.encode(), digest_size=8, key=b"task split").digest()
        return int.from_bytes(digest, "big") < self.validation_fraction * 2**64

    def problems(self, split: Split, seed: int, stream: int, offset: int = 0) -> Iterator[Problem]:
        """Endless problems of ``split``; the same for the same seed, stream and offset, all non-negative."""
        name = int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "big")
        key = np.array([seed ^ (_STREAMS[split] << 32), name], dtype=np.uint64)
        counter = np.array([0, 0, offset, stream], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        while True:
            for _ in range(_MOST_DRAWS):
                problem = self.draw(rng)
                if self.is_held_out(problem) == (split == "validation"):
                    break
            else:
                raise ValueError(
                    f"validation_fraction = {self.validation_fraction}: leaves no problem of {self.key} for {split}"
                )
            yield problem

    def distinct_problems(self, split: Split, count: int) -> list[Problem]:
        """Up to ``count`` different problems of each difficulty, the same ones every time.

        A difficulty that has fewer (there are few sums of one digit) gives those it has, as far as they were found
        before draws had nothing new to offer.
        """
        found: dict[str, dict[str, Problem]] = {name: {} for name in self.difficulties}
        in_vain = dict.fromkeys(found, 0)  # draws in a row without a new problem
        for problem in self.problems(split, seed=0, stream=0):
            of_difficulty = found[problem.difficulty]
            if problem.prompt in of_difficulty:
                in_vain[problem.difficulty] += 1
            elif len(of_difficulty) < count:
                of_difficulty[problem.prompt], in_vain[problem.difficulty] = problem, 0
            if all(len(of) == count or in_vain[name] > _IN_VAIN + 10 * len(of) for name, of in found.items()):
                break
        return [problem for of_difficulty in found.values() for problem in of_difficulty.values()]
