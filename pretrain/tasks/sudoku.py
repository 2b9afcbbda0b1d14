"""Sudoku of 4 x 4: ``432.1.3.2...341.=4321123421433412``, each with exactly one solution; the answer is the whole grid.

Rows are written one after the other, empty cells as dots; a puzzle is solved when all sixteen cells are right. The size
is the number of empty cells, 1 to 12: no puzzle has a single solution with fewer than four clues.

**Enumerated, not searched.** There are 288 grids. Two of them, g and h, differ in a set of cells D(g, h), and clues
decide between them when they hold one of these: clues C belong to g alone when ``C & D(g, h)`` is empty for no other h.
This is worked out for all 2^16 sets C and the 12 grids whose first row is 1234; the other grids are these with their
digits renamed. A draw is uniform over all puzzles with as many empty cells. Cost: 0.2 s once a process, and 10 MB.

**Held out by solution.** Two problems are the same when their solutions are, whatever the clues: no grid that held-out
puzzles ask for has ever been an answer in training, so knowing the trained grids by heart solves none of them.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations, product
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from launch.settings import SettingError
from pretrain.tasks.interface import Lengths, Question, Task

CELLS = 16
MAX_EMPTIES = 12
EMPTY = "."


class Sudoku(Task):
    """Puzzles with ``min_empties`` to ``max_empties`` empty cells."""

    unit: ClassVar[str] = "empties"

    kind: Literal["sudoku"] = "sudoku"
    min_empties: int = Field(4, ge=1, le=MAX_EMPTIES)
    max_empties: int = Field(10, ge=1, le=MAX_EMPTIES)

    @model_validator(mode="after")
    def _empties_rise(self) -> Sudoku:
        if self.min_empties > self.max_empties:
            raise SettingError("min_empties", self.min_empties, f"exceeds max_empties = {self.max_empties}")
        return self

    @property
    def alphabet(self) -> str:
        """Four digits, the empty cell, equals."""
        return "1234" + EMPTY + "="

    @property
    def sizes(self) -> tuple[range, ...]:
        """The number of empty cells."""
        return tuple(range(empties, empties + 1) for empties in range(self.min_empties, self.max_empties + 1))

    @property
    def largest_possible(self) -> int:
        """With fewer than four clues there are always several solutions."""
        return MAX_EMPTIES

    def lengths(self, size: int) -> Lengths:
        """The cells and equals; the cells."""
        return Lengths(CELLS + 1, CELLS)

    def draw(self, rng: np.random.Generator, size: int) -> Question:
        """A puzzle with ``size`` empty cells."""
        puzzles = puzzles_by_empties()[size]
        which = int(rng.integers(len(puzzles.clues)))
        names = "".join("1234"[number] for number in rng.permutation(4).tolist())
        clues = int(puzzles.clues[which])
        grid = "".join(names[digit] for digit in _first_grids()[int(puzzles.grids[which])])
        puzzle = "".join(digit if clues >> cell & 1 else EMPTY for cell, digit in enumerate(grid))
        return Question(puzzle + "=", grid, identity=grid)


class Puzzles(NamedTuple):
    """Puzzles up to the names of the digits: which grid, and which cells are clues (bit c for cell c)."""

    grids: NDArray[np.int64]
    clues: NDArray[np.int64]


@cache
def puzzles_by_empties() -> dict[int, Puzzles]:
    """All puzzles with one solution whose solution begins with 1234, by their number of empty cells, 1 to 12."""
    every_set = np.arange(2**CELLS, dtype=np.uint16)
    empties = CELLS - np.unpackbits(every_set.view(np.uint8)).reshape(-1, CELLS).sum(axis=1, dtype=np.int64)
    grids = np.array(all_grids(), dtype=np.int64)
    found: list[NDArray[np.int64]] = []
    for number, grid in enumerate(_first_grids()):
        differ = (grids != np.array(grid)) @ (1 << np.arange(CELLS))
        decisive = np.ones(2**CELLS, dtype=bool)
        for cells in _smallest(differ[differ > 0].tolist()):
            decisive &= (every_set & np.uint16(cells)) != 0
        clues = np.flatnonzero(decisive)
        found.append(np.stack((np.full_like(clues, number), clues)))
    numbers, clues = np.concatenate(found, axis=1)
    return {
        count: Puzzles(numbers[empties[clues] == count], clues[empties[clues] == count])
        for count in range(1, MAX_EMPTIES + 1)
    }


def _smallest(sets: list[int]) -> list[int]:
    """Those of ``sets`` (bits) that contain no other: clues that meet these meet all."""
    kept: list[int] = []
    for cells in sorted(set(sets), key=lambda cells: (cells.bit_count(), cells)):
        if all(cells & smaller != smaller for smaller in kept):
            kept.append(cells)
    return kept


@cache
def all_grids() -> tuple[tuple[int, ...], ...]:
    """The 288 grids, sixteen numbers 0 to 3 each, row by row."""
    return tuple(tuple(names[digit] for digit in grid) for grid in _first_grids() for names in permutations(range(4)))


@cache
def _first_grids() -> tuple[tuple[int, ...], ...]:
    """The 12 grids whose first row is in order; each stands for the 24 namings of its digits."""
    found = []
    rows = tuple(permutations(range(4)))
    for four in product(rows[:1], rows, rows, rows):
        boxes = (four[at][side : side + 2] + four[at + 1][side : side + 2] for at in (0, 2) for side in (0, 2))
        if all(len(set(group)) == 4 for group in (*zip(*four, strict=True), *boxes)):
            found.append(tuple(cell for row in four for cell in row))
    return tuple(found)
