"""Tasks as training data: fixed splits, rows by number, only answers count, exact scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.settings import BadInputError, parse_settings
from pretrain.config import DataSection, TrainingConfig
from pretrain.data import (
    BatchLoader,
    TaskHeldOut,
    TaskRows,
    held_out_sets,
    open_main,
    open_sampler,
    past_of,
    validation_batches,
)
from pretrain.run_tokenizer import keep_tokenizer, load_kept_tokenizer
from pretrain.tasks import Addition
from pretrain.tasks.dataset import TaskDataset
from pretrain.tasks.scoring import exact_match

SUMS = TaskDataset(Addition(max_digits=3))
SECTION: dict[str, Any] = {
    "sequence_length": 48,
    "global_batch_size": 8,
    "document_mask": True,
    "sources": [
        {"name": "three", "task": {"kind": "addition", "min_digits": 3}},
        {"name": "one", "task": {"kind": "addition", "max_digits": 1, "validation_fraction": 0.2}},
    ],
    "stages": [{"from_tokens": 0, "weights": {"one": 1}}, {"from_tokens": 768, "weights": {"three": 3, "one": 1}}],
}


def texts(tokens: np.ndarray[Any, Any]) -> list[str]:
    """The problems of a row, without its padding."""
    pieces = "".join("|" if token == SUMS.end_token_id else SUMS.task.alphabet[token] for token in tokens.tolist())
    return [piece for piece in pieces.split("|") if piece]


def operands(text: str) -> tuple[int, ...]:
    return tuple(sorted(map(int, text.split("=")[0].split("+"))))


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**40), st.sampled_from(["plain", "reversed"]), st.integers(2, 4))
def test_problems_are_right_and_a_function_of_seed_and_number(seed: int, number: int, order: Any, count: int) -> None:
    task = Addition(max_digits=4, operands=count, answer_order=order)
    first, again = (next(task.problems("train", seed, number)) for _ in range(2))
    assert first == again
    numbers = [int(part) for part in first.prompt.removesuffix("=").split("+")]
    assert len(numbers) == count
    assert first.answer[:: 1 if order == "plain" else -1] == str(sum(numbers))
    assert {len(part) for part in first.prompt.removesuffix("=").split("+")} == {int(first.difficulty[0])}
    assert len(first.prompt + first.answer) <= task.longest


def test_no_run_trains_on_a_held_out_sum_or_its_mirror_image() -> None:
    held_out = {operands(problem.prompt) for problem in SUMS.held_out_problems(512)}
    assert len(held_out) > 500
    seen = set()
    for seed in (0, 7):
        rows = TaskRows(SUMS, 64, seed)
        seen |= {operands(text) for block in range(300) for text in texts(rows.read(block, 0, 64, False).tokens)}
    assert not seen & held_out
    small = [pair for pair in seen | held_out if max(pair) < 10]
    assert 0 < len([pair for pair in small if pair in held_out]) < 12, "about a tenth of 55 pairs of one digit"


def test_held_out_problems_are_the_same_for_every_run_and_different_from_one_another() -> None:
    problems = SUMS.held_out_problems(40)
    assert problems == TaskDataset(Addition(max_digits=3)).held_out_problems(40)
    assert len({problem.prompt for problem in problems}) == len(problems)
    counts = [sum(problem.difficulty == name for problem in problems) for name in SUMS.domains]
    assert counts[1:] == [40, 40]
    everything = {(a, b) for a in range(10) for b in range(10)}
    one_digit = {pair for pair in everything if SUMS.task.is_held_out(next(iter([_problem(*pair)])))}
    found = {tuple(map(int, p.prompt[:-1].split("+"))) for p in problems if p.difficulty == "1_digits"}
    assert found == one_digit


def _problem(a: int, b: int) -> Any:
    from pretrain.tasks import Problem

    return Problem(f"{a}+{b}=", str(a + b), "1_digits", "+".join(map(str, sorted((a, b)))))


def test_only_answers_and_their_ends_count_and_problems_are_documents() -> None:
    row = TaskRows(SUMS, 64, 3).read(11, 0, 64, True)
    assert row.counted is not None
    assert row.document_ids is not None
    targets = row.tokens[1:]
    expected = np.zeros(64, dtype=bool)
    number, in_answer = 0, False
    for place, token in enumerate(targets.tolist()):
        expected[place] = in_answer
        assert row.document_ids[place] == number
        if in_answer and token == SUMS.end_token_id:
            number, in_answer = number + 1, False
        in_answer = in_answer or token == SUMS.task.alphabet.index("=")
    assert number > 3
    assert (row.counted == expected).all()
    assert row.tokens[0] == SUMS.end_token_id


def sampler_of(values: dict[str, Any], seed: int = 0) -> Any:
    section = parse_settings(DataSection, values, "test")
    return open_sampler(section, seed, 13, open_main(section))


def test_a_step_has_the_same_samples_on_any_ranks() -> None:
    sampler = sampler_of(SECTION)
    whole = BatchLoader(sampler, 8, 8, with_documents=True).step_batches(16)[0]
    parts = [
        batch
        for rank in range(2)
        for batch in BatchLoader(sampler_of(SECTION), 8, 2, rank, 2, with_documents=True).step_batches(16)
    ]
    for key in ("input_ids", "targets", "document_ids"):
        assert torch.equal(getattr(whole, key), torch.cat([getattr(part, key) for part in parts]))
    other = BatchLoader(sampler_of(SECTION, seed=1), 8, 8).step_batches(16)[0]
    assert not torch.equal(whole.input_ids, other.input_ids)


def test_a_curriculum_changes_the_difficulty() -> None:
    sampler = sampler_of(SECTION)
    longest = [
        max(
            len(operand)
            for row in sampler.rows(range(8 * step, 8 * step + 8))
            for text in texts(row.tokens)
            for operand in text.split("=")[0].split("+")
        )
        for step in range(4)
    ]
    assert longest == [1, 1, 3, 3]


def test_a_checkpoint_refuses_another_task_but_not_a_later_stage() -> None:
    identity = sampler_of(SECTION).identity()
    harder = json.loads(json.dumps(SECTION))
    harder["sources"][0]["task"]["operands"] = 3
    harder["sequence_length"] = 48
    changed = sampler_of(harder).identity()
    assert past_of(identity, 16) == past_of(changed, 16), "the first stage does not use it"
    assert past_of(identity, 17) != past_of(changed, 17)


def test_held_out_rows_ask_every_problem_once() -> None:
    section = parse_settings(DataSection, SECTION, "test")
    first, second = held_out_sets(section, open_main(section))
    assert isinstance(first, TaskHeldOut)
    assert (list(first.sources), list(second.sources)) == (["three"], ["one"])
    asked = []
    for rank in range(2):
        for batch in validation_batches(first, 3, rank, 2, with_documents=True):
            counted = batch.targets != -100
            assert batch.domain_ids is not None
            assert (batch.domain_ids[counted] == 0).all()
            assert (batch.domain_ids[~counted] == -1).all()
            asked += [text for row in batch.input_ids.numpy() for text in texts(np.append(row, SUMS.end_token_id))]
    assert sorted(text.split("=")[0] + "=" for text in asked) == sorted(p.prompt for p in first.problems)


class Oracle(torch.nn.Module):
    """Writes the right sum, except where the first operand is odd: there the first digit is another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, ids: torch.Tensor, longest: int, n_loops: int | None, **_: Any) -> torch.Tensor:
        rows = []
        for row in ids.tolist():
            a, b = (int(part) for part in "".join(SUMS.task.alphabet[i] for i in row[1:-1]).split("+"))
            answer = SUMS.tokenizer.encode(str(a + b))
            if a % 2:
                answer[0] = (answer[0] + 1) % 10
            rows.append(row + answer + [SUMS.end_token_id] * (longest - len(answer)))
        return torch.tensor(rows)

    def forward(self, ids: torch.Tensor, n_loops: int | None, **_: Any) -> Any:
        class Output:
            loops_used_BS = torch.arange(ids.shape[1]).expand_as(ids)

        return Output()


def test_exact_match_counts_whole_answers_by_difficulty() -> None:
    problems = SUMS.held_out_problems(60)
    model: Any = Oracle()
    scores = exact_match(model, SUMS, problems)
    assert list(scores) == ["1_digits", "2_digits", "3_digits"]
    for name, score in scores.items():
        own = [problem for problem in problems if problem.difficulty == name]
        assert score.problems == len(own)
        assert score.solved == sum(int(problem.prompt.split("+")[0]) % 2 == 0 for problem in own)
        # Position p of the stand-in used p loops; answers are written from the "=" on.
        digits = int(name[0])
        means = [2 * digits + 2 + len(problem.answer) / 2 for problem in own]
        assert score.loops_used == pytest.approx(sum(means) / len(means))
    assert scores["3_digits"].accuracy == scores["3_digits"].solved / 60


def test_a_run_keeps_its_task_tokenizer(tmp_path: Path) -> None:
    keep_tokenizer(SUMS, tmp_path)
    kept = load_kept_tokenizer(tmp_path)
    assert kept is not None
    assert kept.encode("12+3=15") == SUMS.tokenizer.encode("12+3=15") == [1, 2, 10, 3, 11, 1, 5]
    assert kept.decode([*kept.encode("7+8="), kept.end_id]) == "7+8="
    assert kept.byte_lengths().tolist() == [1] * 12 + [0]


def test_a_character_the_task_does_not_have_is_refused() -> None:
    with pytest.raises(BadInputError, match="' ': is none of this task's characters, 0123456789"):
        SUMS.tokenizer.encode("1 + 2=")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "x", "task": {"kind": "addition"}}, "one of them"),
        ({"weight": 1}, "path: is required"),
        ({"task": {"kind": "addition", "min_digits": 4}}, "min_digits = 4: exceeds max_digits = 3"),
        ({"task": {"kind": "subtraction"}}, r'task\.kind = "subtraction": unknown; accepted: addition, copy, '),
        ({"task": {"max_digits": 2}}, r"sources\.0\.task\.kind: is required and missing"),
        ({"task": {"kind": "mano", "modulo": 5}}, r"0\.task\.modulo = 5: unknown key; did you mean modulus\?"),
        ({"task": {"kind": "mano", "modulus": 99}}, r"test: sources\.0\.task\.modulus = 99: "),
        ({"task": {"kind": "addition"}, "domains": ["a"]}, "chooses documents of a data set"),
    ],
)
def test_sources_that_make_no_sense_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises((BadInputError, ValidationError), match=message):
        parse_settings(DataSection, {"sources": [source]}, "test")


def test_rows_too_short_for_a_problem_and_a_vocabulary_too_small_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"sequence_length = 12: a problem of task .* has up to 13 tokens"):
        TaskRows(SUMS, 12, 0)
    section = parse_settings(DataSection, SECTION, "test")
    with pytest.raises(BadInputError, match=r"model\.vocab_size = 12: smaller than the 13 tokens"):
        open_sampler(section, 0, 12, open_main(section))


def test_a_plain_core_refuses_truncation_that_would_cut_off_its_input(repository_root: Path) -> None:
    path = repository_root / "configs" / "tasks" / "addition_plain_flops.json"
    values = json.loads(path.read_text())
    values["loop"]["grad_loops"] = 1
    with pytest.raises(BadInputError, match=r"loop\.grad_loops = 1: .*prelude and embedding would not learn"):
        parse_settings(TrainingConfig, values, path.name)


@pytest.mark.parametrize("name", ["addition_rrslm", "addition_plain_parameters", "addition_plain_flops"])
def test_the_addition_configurations_are_valid_and_comparable(repository_root: Path, name: str) -> None:
    from model.parameters import count_parameters, training_flops_per_token

    values = json.loads((repository_root / "configs" / "tasks" / f"{name}.json").read_text())
    config = parse_settings(TrainingConfig, values, name)
    rrslm = parse_settings(
        TrainingConfig, json.loads((repository_root / "configs" / "tasks" / "addition_rrslm.json").read_text()), "rrslm"
    )
    assert config.data == rrslm.data
    assert config.optim == rrslm.optim
    total = count_parameters(config.model).total / count_parameters(rrslm.model).total
    flops = training_flops_per_token(config.model, config.mean_loops, context=64) / training_flops_per_token(
        rrslm.model, rrslm.mean_loops, context=64
    )
    if name == "addition_plain_parameters":
        assert total == pytest.approx(1, rel=0.02)
    if name == "addition_plain_flops":
        assert flops == pytest.approx(1, rel=0.15)
