"""Mano: an example by hand, uniform trees, and mirror images on one side of the split."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
from answers import right_answer

from pretrain.tasks import Mano


def test_an_expression_by_hand() -> None:
    # (3 * 10) - (11 + 7) = 12, and 23 more or less do not matter
    assert right_answer(Mano(), "-*3a+b7=") == "c"
    assert right_answer(Mano(), "-+b7*3a=") == "b"


def test_trees_are_uniform() -> None:
    rng, task = np.random.default_rng(0), Mano()
    shapes = Counter(
        "".join("o" if symbol in "+-*" else "n" for symbol in task.draw(rng, 3).prompt[:-1]) for _ in range(1000)
    )
    assert len(shapes) == 5, "the Catalan number of 3"
    assert all(150 < count < 250 for count in shapes.values())


def test_expressions_that_differ_in_the_order_of_operands_are_one_problem() -> None:
    evaluate = Mano()._evaluate
    assert evaluate("+1*23") == evaluate("+*321")
    assert evaluate("-12")[1] != evaluate("-21")[1]
    assert evaluate("+1-23")[1] == evaluate("+-231")[1] != evaluate("+1-32")[1]


def test_small_expressions_are_held_out_together_with_their_mirror_images() -> None:
    task = Mano(max_operators=1, modulus=7, validation_fraction=0.3)
    held_out = {problem.prompt for problem in task.distinct_problems("validation", 1000)}
    trained = {problem.prompt for problem in itertools.islice(task.problems("train", 0, 0), 1500)}
    assert len(held_out | trained) == 3 * 49, "every expression of one operator is in one of them"
    for prompt in held_out:
        operator, left, right = prompt[:3]
        assert prompt not in trained
        if operator in "+*":
            assert f"{operator}{right}{left}=" in held_out
