"""A task as a source of training rows, beside the prepared data sets: row i is a pure function of (seed, task, i).

A row of S targets is filled with whole problems, each ended by the end token, as best-fit packing does with documents:
the first token only serves as the first target's input, problems follow one another while the longest one would still
fit, and the rest is padding. Only answers and the end tokens after them count as targets; nobody can predict what
will be asked. Each problem is a document, so that ``data.document_mask`` keeps attention inside it.

Held out is a fixed set of problems, the same for every run of the task.

A generator has no end; an "epoch" of ``EPOCH_ROWS`` rows exists because a mixture counts in epochs, and the next one
has other problems. ``max_epochs`` therefore limits rows, not repetition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launch.settings import BadInputError
from pretrain.data.packing import HeldOutRow, Row
from pretrain.tasks.dataset import TaskDataset
from pretrain.tasks.interface import Problem

EPOCH_ROWS = 2**20
HELD_OUT_PROBLEMS = 512  # of each difficulty


class TaskRows:
    """The training rows of a task.

    Args:
        dataset: The task with its vocabulary.
        sequence_length: Targets S of a row.
        seed: The run's.

    Raises:
        BadInputError: When the longest problem does not fit a row.
    """

    def __init__(self, dataset: TaskDataset, sequence_length: int, seed: int) -> None:
        require_room(dataset, sequence_length)
        self.dataset, self.sequence_length, self._seed = dataset, sequence_length, seed
        self.n_blocks = EPOCH_ROWS
        self.key = f"{dataset.fingerprint}/train/{sequence_length}"

    @property
    def total_tokens(self) -> int:
        """Targets of an epoch."""
        return self.n_blocks * self.sequence_length

    def blocks_at(self, epochs: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row at each place of an epoch: drawn at random as they are, rows need no shuffling."""
        return epochs * self.n_blocks + places

    def read(self, block: int, offset: int, length: int, with_documents: bool) -> Row:
        """A row of ``length`` targets; another offset (a part, where a stage has shorter rows) has other problems."""
        require_room(self.dataset, length)
        task, problems, filled = self.dataset.task, [], 0
        stream = task.problems("train", self._seed, block, offset)
        while length - filled > task.longest:
            problems.append(next(stream))
            filled += _size(problems[-1])
        return packed(self.dataset, problems, length, with_documents)


@dataclass(frozen=True)
class TaskHeldOut:
    """Held-out ``problems``, in rows of ``sequence_length`` targets.

    The rows are longer than ``train_length``, the targets of a training row, where a problem beyond training is.
    ``sources`` has the mixture's sources that are made of this task, by name.
    """

    dataset: TaskDataset
    train_length: int
    sources: Mapping[str, tuple[str, ...] | None]
    problems: list[Problem]

    @property
    def sequence_length(self) -> int:
        """Targets of a row."""
        return max(self.train_length, self.dataset.task.longest_row)

    def first_problems(self, count: int | None) -> list[Problem]:
        """The first ``count`` problems of each difficulty; None: all."""
        return [
            problem
            for difficulty in self.dataset.domains
            for problem in [each for each in self.problems if each.difficulty == difficulty][:count]
        ]

    @cached_property
    def _rows(self) -> list[list[Problem]]:
        rows: list[list[Problem]] = [[]]
        filled = 0
        for problem in self.problems:
            size = _size(problem)
            if filled + size > self.sequence_length:
                rows.append([])
                filled = 0
            rows[-1].append(problem)
            filled += size
        return rows

    @property
    def n_blocks(self) -> int:
        """Rows."""
        return len(self._rows)

    def read(self, block: int) -> HeldOutRow:
        """One row; only answers count."""
        problems = self._rows[block]
        row = packed(self.dataset, problems, self.sequence_length, with_documents=True)
        assert row.document_ids is not None
        assert row.counted is not None
        # Padding is a document behind the last problem's.
        domains = np.array([*(self.dataset.domains.index(problem.difficulty) for problem in problems), -1])
        return HeldOutRow(row.tokens, row.counted, domains[row.document_ids], row.document_ids)


def require_room(dataset: TaskDataset, length: int) -> None:
    """Raise ``BadInputError`` when the longest problem and its end token have more than ``length`` tokens."""
    longest = dataset.task.longest + 1
    if longest > length:
        raise BadInputError(
            f"data.sequence_length = {length}: a problem of {dataset.folder} has up to {longest} tokens; "
            "use that or more"
        )


def packed(dataset: TaskDataset, problems: list[Problem], length: int, with_documents: bool) -> Row:
    """``problems``, which must fit, as a row of ``length`` targets."""
    end = dataset.end_token_id
    tokens = np.full(length + 1, end, dtype=np.int64)
    counted = np.zeros(length, dtype=bool)
    document_ids = np.empty(length, dtype=np.int64)
    filled = 0
    for number, problem in enumerate(problems):
        size, question = _size(problem), len(problem.prompt)
        tokens[filled + 1 : filled + size] = dataset.tokenizer.encode(problem.prompt + problem.answer)
        counted[filled + question : filled + size] = True
        document_ids[filled : filled + size] = number
        filled += size
    document_ids[filled:] = len(problems)  # padding is a document of its own, so that every query has a key
    return Row(tokens, document_ids if with_documents else None, counted)


def _size(problem: Problem) -> int:
    return len(problem.prompt) + len(problem.answer) + 1
