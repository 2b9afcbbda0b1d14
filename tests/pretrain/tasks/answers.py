"""Every task's answer, worked out another way than the generators do, from the prompt alone."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.tasks import Addition, Copy, Mano, Parity, PHop, Sudoku, Task


def right_answer(task: Task, prompt: str) -> str:
    """The answer to ``prompt``, which ends in "="."""
    question = prompt.removesuffix("=")
    assert prompt == question + "="
    match task:
        case Addition():
            total = str(sum(map(int, question.split("+"))))
            return total if task.answer_order == "plain" else "".join(reversed(total))
        case PHop():
            hops, text = question.split(":")
            return hop(text, int(hops))
        case Mano():
            symbols = iter(question)
            value = eval(in_infix(symbols), {}, {})  # of digits, operators and brackets, written below
            assert next(symbols, None) is None
            return "0123456789abcdefghijklmnopqrstuvwxyz"[value % task.modulus]
        case Parity():
            return "01"[int(question, 2).bit_count() % 2]
        case Copy():
            return question if task.answer_order == "plain" else "".join(reversed(question))
        case Sudoku():
            (solution,) = solutions(question)
            return solution
    raise AssertionError(task)


def hop(text: str, hops: int) -> str:
    """The definition with its indices from 1: ``find(i) = max {j <= i : x_(j-1) = x_i}``."""
    x = dict(enumerate(text, start=1))
    i = len(text)
    for _ in range(hops):
        i = max(j for j in range(2, i + 1) if x[j - 1] == x[i])
    return x[i]


def in_infix(symbols: Iterator[str]) -> str:
    """A prefix expression with brackets instead, its numbers in decimal; Python's integers do the rest, unreduced."""
    symbol = next(symbols)
    if symbol in "+-*":
        return f"({in_infix(symbols)}{symbol}{in_infix(symbols)})"
    return str(int(symbol, 36))


def solutions(cells: str) -> list[str]:
    """All ways to fill the dots so that no row, column or box has a digit twice, by trying."""
    at = cells.find(".")
    if at < 0:
        return [cells]
    row, column = divmod(at, 4)
    taken = {
        cells[4 * other_row + other_column]
        for other_row in range(4)
        for other_column in range(4)
        if other_row == row
        or other_column == column
        or (other_row // 2 == row // 2 and other_column // 2 == column // 2)
    }
    return [full for digit in "1234" if digit not in taken for full in solutions(cells[:at] + digit + cells[at + 1 :])]
