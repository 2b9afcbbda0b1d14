"""What every task promises: right answers, fixed splits, problems by number, only answers counted."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from answers import right_answer
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.settings import BadInputError, parse_settings
from pretrain.config import DataSection
from pretrain.data import (
    BatchLoader,
    TaskHeldOut,
    TaskRows,
    held_out_sets,
    open_main,
    open_sampler,
    validation_batches,
)
from pretrain.tasks import Addition, Copy, Mano, Parity, PHop, Sudoku, Task
from pretrain.tasks.dataset import TaskDataset

TASKS: list[Task] = [
    Addition(max_digits=2, beyond=(3, 5)),
    PHop(max_hops=3, length=16, symbols=3, beyond=(5,)),
    Mano(max_operators=3, modulus=5, beyond=(6,)),
    Parity(min_length=2, max_length=9, beyond=(12, 20)),
    Copy(min_length=3, max_length=6, symbols=5, beyond=(9,)),
    Sudoku(min_empties=5, max_empties=7, beyond=(12,)),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)


@st.composite
def any_task(draw: st.DrawFn) -> Task:
    """A task of any kind, with settings that fit one another."""

    def bounds(low: int, high: int) -> tuple[int, int, tuple[int, ...]]:
        first, last, further = sorted(draw(st.tuples(*[st.integers(low, high)] * 3)))
        return first, last, (further,) if further > last else ()

    order = draw(st.sampled_from(["plain", "reversed"]))
    kind = draw(st.sampled_from([type(task) for task in TASKS]))
    if kind is Addition:
        first, last, beyond = bounds(1, 18)
        operands = draw(st.integers(2, 5))
        return Addition(min_digits=first, max_digits=last, beyond=beyond, operands=operands, answer_order=order)
    if kind is PHop:
        symbols, (first, last, beyond) = draw(st.integers(3, 26)), bounds(1, 12)
        length = draw(st.integers(12 * (symbols - 1) + 1, 400))
        return PHop(min_hops=first, max_hops=last, beyond=beyond, symbols=symbols, length=length)
    if kind is Mano:
        first, last, beyond = bounds(1, 20)
        return Mano(min_operators=first, max_operators=last, beyond=beyond, modulus=draw(st.integers(2, 36)))
    if kind is Sudoku:
        first, last, beyond = bounds(1, 12)
        return Sudoku(min_empties=first, max_empties=last, beyond=beyond)
    first, last, beyond = bounds(8, 60)
    groups = draw(st.integers(1, last - first + 1))
    strings = {"min_length": first, "max_length": last, "beyond": beyond, "length_groups": groups}
    if kind is Parity:
        return Parity(**strings)
    return Copy(**strings, symbols=draw(st.integers(2, 26)), answer_order=order)


@settings(max_examples=60)
@given(any_task(), st.integers(0, 2**31 - 1), st.integers(0, 2**40), st.sampled_from(["train", "validation"]))
def test_problems_are_right_and_a_function_of_seed_and_number(task: Task, seed: int, stream: int, split: Any) -> None:
    first, again = (list(islice(task.problems(split, seed, stream), 4)) for _ in range(2))
    assert first == again
    for problem in first:
        assert problem.answer == right_answer(task, problem.prompt)
        assert set(problem.prompt + problem.answer) <= set(task.alphabet)
        assert problem.difficulty in task.difficulties
        assert len(problem.prompt + problem.answer) <= task.longest
        assert task.is_held_out(problem) == (split == "validation")


@settings(max_examples=30)
@given(any_task(), st.integers(0, 2**31 - 1))
def test_problems_of_each_size_are_right_and_as_long_as_they_may_be(task: Task, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for size in (size for sizes in task.all_sizes[-3:] for size in sizes[-2:]):
        problem, longest = task.draw(rng, size), task.lengths(size)
        assert problem.answer == right_answer(task, problem.prompt)
        assert len(problem.prompt) <= longest.prompt <= task.longest_asked.prompt
        assert len(problem.answer) <= longest.answer <= task.longest_asked.answer


@every_task
def test_no_run_trains_on_what_any_run_is_scored_on(task: Task) -> None:
    held_out = TaskDataset(task).held_out_problems(100)
    assert all(map(task.is_held_out, held_out))
    asked = {problem.identity for problem in held_out}
    trained = {problem.identity for seed in (0, 7) for problem in islice(task.problems("train", seed, 3), 1000)}
    assert not asked & trained
    assert len(trained) > 100


@every_task
def test_held_out_problems_are_distinct_and_of_every_difficulty(task: Task) -> None:
    problems = TaskDataset(task).held_out_problems(50)
    assert problems == TaskDataset(task).held_out_problems(50)
    assert len({problem.prompt for problem in problems}) == len(problems)
    names = (*task.difficulties, *task.difficulties_beyond)
    counts = [sum(problem.difficulty == name for problem in problems) for name in names]
    assert all(0 < count <= 50 for count in counts)
    assert set(counts[-len(task.beyond) :]) == {50}, "large problems are many"
    for problem in problems:
        assert problem.answer == right_answer(task, problem.prompt)


@every_task
def test_what_is_asked_beyond_training_changes_neither_training_nor_the_rest(task: Task) -> None:
    plain = task.model_copy(update={"beyond": ()})
    assert plain.key == task.key
    assert TaskDataset(plain).fingerprint == TaskDataset(task).fingerprint
    assert TaskDataset(plain).folder != TaskDataset(task).folder
    rows = [TaskRows(TaskDataset(each), 64, 3).read(7, 0, 64, False).tokens for each in (plain, task)]
    assert (rows[0] == rows[1]).all()
    asked = TaskDataset(task).held_out_problems(20)
    assert TaskDataset(plain).held_out_problems(20) == [p for p in asked if p.difficulty in plain.difficulties]


@every_task
def test_training_has_every_difficulty_alike_and_none_beyond(task: Task) -> None:
    drawn = [problem.difficulty for problem in islice(task.problems("train", 1, 0), 1200)]
    assert set(drawn) == set(task.difficulties)
    # Splits reject a tenth, of small problems (which are few) sometimes none or more.
    expected = 1200 / len(task.difficulties)
    assert all(0.75 * expected < drawn.count(name) < 1.25 * expected for name in task.difficulties)


@every_task
def test_only_answers_and_their_ends_count(task: Task) -> None:
    dataset, length = TaskDataset(task), 96
    for row_number in range(5):
        row = TaskRows(dataset, length, 3).read(row_number, 0, length, True)
        assert row.counted is not None
        assert row.document_ids is not None
        text = "".join("|" if token == dataset.end_token_id else task.alphabet[token] for token in row.tokens)
        assert text[0] == "|"
        expected, problems = [], text[1:].rstrip("|").split("|")
        for problem in problems:
            question, answer = problem.split("=")
            assert answer == right_answer(task, question + "=")
            expected += [False] * (len(question) + 1) + [True] * (len(answer) + 1)
        assert row.counted.tolist() == expected + [False] * (length - len(expected))
        ends = [*(np.flatnonzero(np.diff(row.document_ids)) + 1).tolist(), length]
        assert sorted({*np.cumsum([len(problem) + 1 for problem in problems]).tolist(), length}) == ends


def section_of(task: Task, **more: Any) -> DataSection:
    source = {"task": task.model_dump(mode="json"), "name": "it"}
    values = {"sequence_length": 64, "global_batch_size": 8, "document_mask": True, "sources": [source]}
    return parse_settings(DataSection, values | more, "test")


@every_task
def test_samples_depend_on_neither_ranks_nor_micro_batches(task: Task) -> None:
    def loader(micro: int, rank: int, ranks: int) -> BatchLoader:
        section = section_of(task)
        sampler = open_sampler(section, 5, len(task.alphabet) + 1, open_main(section))
        return BatchLoader(sampler, 8, micro, rank, ranks, with_documents=True)

    (whole,) = loader(8, 0, 1).step_batches(16)
    parts = [batch for rank in range(2) for batch in loader(2, rank, 2).step_batches(16)]
    for key in ("input_ids", "targets", "document_ids"):
        assert torch.equal(getattr(whole, key), torch.cat([getattr(part, key) for part in parts]))


@every_task
def test_every_held_out_problem_is_asked_once_in_its_difficulty_also_beyond_the_training_rows(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.validation.HELD_OUT_PROBLEMS", 40)
    section = section_of(task, sequence_length=task.longest + 1)
    (entry,) = held_out_sets(section, open_main(section))
    assert isinstance(entry, TaskHeldOut)
    dataset = TaskDataset(task)
    asked: list[tuple[str, str]] = []
    for rank in range(2):
        for batch in validation_batches(entry, 16, rank, 2):
            assert batch.domain_ids is not None
            for row, targets, domains in zip(batch.input_ids, batch.targets, batch.domain_ids, strict=True):
                assert ((domains >= 0) == (targets != -100)).all()
                text = "".join("|" if t == dataset.end_token_id else task.alphabet[t] for t in row.tolist())
                places = np.flatnonzero(np.array(list(text)) == "=")
                asked += [
                    (text[: place + 1].rsplit("|", 1)[1], dataset.domains[int(domains[place])]) for place in places
                ]
    problems = entry.problems
    assert len(problems) > 100
    assert sorted(asked) == sorted((problem.prompt, problem.difficulty) for problem in problems)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "p_hop", "min_hops": 5}, "min_hops = 5: exceeds max_hops = 4"),
        ({"kind": "p_hop", "length": 9}, "max_hops = 4: 9 symbols, 4 different ones, hold chains of 2 hops; raise"),
        ({"kind": "p_hop", "length": 13, "beyond": [5]}, r"beyond = \[5\]: at most 4 hops are possible"),
        ({"kind": "mano", "min_operators": 9}, "min_operators = 9: exceeds max_operators = 6"),
        ({"kind": "mano", "modulus": 37}, "modulus = 37: "),
        ({"kind": "parity", "min_length": 20}, "min_length = 20: exceeds max_length = 16"),
        ({"kind": "parity", "length_groups": 17}, "length_groups = 17: more than the lengths 1 to 16"),
        ({"kind": "copy", "beyond": [20, 18]}, r"beyond = \[20, 18\]: must rise from above 16 symbols"),
        ({"kind": "copy", "beyond": [16]}, r"beyond = \[16\]: must rise from above 16 symbols"),
        ({"kind": "sudoku", "min_empties": 11}, "min_empties = 11: exceeds max_empties = 10"),
        ({"kind": "sudoku", "beyond": [13]}, r"beyond = \[13\]: at most 12 empties are possible"),
        ({"kind": "sudoku", "length": 3}, "length = 3: unknown key; remove it. Accepted here: beyond, kind, max_empt"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=r"test: sources\.0\.task\." + message):
        parse_settings(DataSection, {"sources": [{"task": values}]}, "test")


def test_a_split_without_problems_is_refused_before_training() -> None:
    section = section_of(Parity(max_length=4, length_groups=1, validation_fraction=1e-6))
    with pytest.raises(BadInputError, match=r"validation_fraction = 1e-06: leaves no problem of 1_to_4_symbols"):
        held_out_sets(section, open_main(section))


def test_tasks_of_different_alphabets_do_not_mix() -> None:
    sources = [{"task": {"kind": "parity"}}, {"task": {"kind": "copy"}}]
    section = parse_settings(DataSection, {"sources": sources}, "test")
    with pytest.raises(BadInputError, match=r"task .*copy.*another tokenizer than task .*need one alphabet"):
        open_sampler(section, 0, 99, open_main(section))
