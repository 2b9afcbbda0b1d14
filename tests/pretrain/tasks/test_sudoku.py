"""Sudoku: the enumeration against published counts and a solver that tries."""

from __future__ import annotations

import itertools

import numpy as np
from answers import solutions

from pretrain.tasks import Sudoku
from pretrain.tasks.sudoku import all_grids, puzzles_by_empties


def written(grid: tuple[int, ...]) -> str:
    return "".join("1234"[digit] for digit in grid)


def test_there_are_288_grids_and_the_solver_finds_the_same() -> None:
    assert {written(grid) for grid in all_grids()} == set(solutions("." * 16))
    assert len(all_grids()) == 288


def test_as_many_puzzles_of_four_clues_as_published_and_none_of_three() -> None:
    # 25,728 of 4 x 4 puzzles with four clues have one solution (e.g. Taalman 2007, "Taking Sudoku seriously": shidoku).
    puzzles = puzzles_by_empties()
    assert 24 * len(puzzles[12].clues) == 25_728
    assert len(puzzles[1].clues) == 12 * 16, "one cell may always be left out"
    grid = written(all_grids()[100])
    for clues in itertools.islice(itertools.combinations(range(16), 3), 0, None, 8):
        assert len(solutions_up_to_two("".join(d if c in clues else "." for c, d in enumerate(grid)))) == 2


def solutions_up_to_two(cells: str) -> list[str]:
    fitting = [
        grid for grid in map(written, all_grids()) if all(c in (".", d) for c, d in zip(cells, grid, strict=True))
    ]
    return fitting[:2]


def test_a_set_of_clues_is_listed_exactly_when_the_solver_finds_one_solution() -> None:
    rng = np.random.default_rng(0)
    firsts = [grid for grid in all_grids() if grid[:4] == (0, 1, 2, 3)]
    found = [0, 0]
    for _ in range(120):
        number, size = int(rng.integers(12)), int(rng.integers(5, 9))
        cells = rng.permutation(16)[:size].tolist()
        clues = sum(1 << cell for cell in cells)
        puzzles = puzzles_by_empties()[16 - size]
        listed = bool(((puzzles.clues == clues) & (puzzles.grids == number)).any())
        text = "".join(digit if cell in cells else "." for cell, digit in enumerate(written(firsts[number])))
        assert listed == (len(solutions(text)) == 1)
        found[listed] += 1
    assert min(found) > 20, found


def test_no_held_out_solution_was_ever_an_answer() -> None:
    task = Sudoku(min_empties=8, max_empties=8)
    held_out = {problem.answer for problem in task.distinct_problems("validation", 250)}
    trained = {problem.answer for problem in itertools.islice(task.problems("train", 0, 0), 2500)}
    assert not held_out & trained
    assert held_out | trained == {written(grid) for grid in all_grids()}
    assert 15 <= len(held_out) <= 45, "about a tenth of 288"


def test_puzzles_of_a_size_are_drawn_alike() -> None:
    task, rng = Sudoku(min_empties=1), np.random.default_rng(1)
    drawn = [task.draw(rng, 1) for _ in range(4000)]
    empty = [problem.prompt.index(".") for problem in drawn]
    assert all(180 < empty.count(cell) < 320 for cell in range(16))
    assert len({problem.answer for problem in drawn}) == 288
