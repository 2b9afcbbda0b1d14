"""Exact scoring against outputs written by hand, and at the edge of what a model may be asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.settings import BadInputError, parse_settings
from model import IceConfig, IceModel
from pretrain.config import TrainingConfig
from pretrain.tasks import Copy, Parity, Problem
from pretrain.tasks.dataset import TaskDataset
from pretrain.tasks.scoring import exact_match

COPY = TaskDataset(Copy(min_length=2, max_length=4, length_groups=1, symbols=4, beyond=(5,)))
END = "|"


class Scripted(torch.nn.Module):
    """Writes what the script has for a prompt (END is the end token), then end tokens."""

    def __init__(self, script: dict[str, str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script, self.asked = script, list[str]()

    def generate(self, ids: torch.Tensor, longest: int, n_loops: int | None, **options: Any) -> torch.Tensor:
        assert options == {"temperature": 0.0, "stop_token_ids": (COPY.end_token_id,)}
        symbols = COPY.task.alphabet + END
        prompts = ["".join(symbols[token] for token in row) for row in ids.tolist()]
        assert all(prompt[0] == END for prompt in prompts), "a row begins with an end token, as in training"
        self.asked += [prompt[1:] for prompt in prompts]
        written = [self.script[prompt[1:]].ljust(longest, END)[:longest] for prompt in prompts]
        return torch.cat((ids, torch.tensor([[symbols.index(each) for each in text] for text in written])), dim=1)

    def forward(self, ids: torch.Tensor, n_loops: int | None, **_: Any) -> Any:
        class Output:
            loops_used_BS = None

        return Output()


def problem(text: str, difficulty: str = "2_to_4_symbols") -> Problem:
    return Problem(text + "=", text, difficulty, text)


@pytest.mark.parametrize(
    ("written", "solved"),
    [
        ("abc", True),
        ("abc|abc", True),  # what follows the end token does not matter
        ("abd", False),
        ("bbc", False),
        ("ab", False),  # ended too early
        ("abca", False),  # did not end
        ("", False),
        ("abc=", False),
    ],
)
def test_the_whole_answer_and_its_end_must_be_right(written: str, solved: bool) -> None:
    model: Any = Scripted({"abc=": written})
    (score,) = exact_match(model, COPY, [problem("abc")]).values()
    assert (score.problems, score.solved, score.accuracy, score.loops_used) == (1, solved, float(solved), None)


def test_difficulties_are_counted_apart_and_every_problem_once() -> None:
    problems = [problem("ab"), problem("abcd"), problem("dcba"), problem("aabbc", "5_symbols"), problem("ca")]
    script = {"ab=": "ab", "abcd=": "abcc", "dcba=": "dcba", "aabbc=": "aabb", "ca=": "ca"}
    model: Any = Scripted(script)
    scores = exact_match(model, COPY, problems)
    assert list(scores) == ["2_to_4_symbols", "5_symbols"]
    assert (scores["2_to_4_symbols"].problems, scores["2_to_4_symbols"].solved) == (4, 3)
    assert (scores["5_symbols"].problems, scores["5_symbols"].solved) == (1, 0)
    assert sorted(model.asked) == sorted(script)


def values_for(task: Parity | Copy, **model: int) -> dict[str, Any]:
    return {
        "model": {"vocab_size": 30, **model},
        "data": {"sequence_length": 32, "sources": [{"task": task.model_dump(mode="json")}]},
    }


def test_a_model_that_a_problem_just_fits_is_asked_and_one_token_less_is_refused() -> None:
    task = Copy(min_length=4, max_length=6, length_groups=1, symbols=3, beyond=(17,))
    sizes = {"max_seq_len": 17 + 1 + 17 + 2, "max_output_tokens": 18}
    config = parse_settings(TrainingConfig, values_for(task, **sizes), "file").model
    small = IceConfig(**config.model_dump()).scaled_down().model_copy(update=sizes | {"vocab_size": 30})
    dataset = TaskDataset(task)
    scores = exact_match(IceModel(small).eval(), dataset, dataset.held_out_problems(3), 1)
    assert {name: score.problems for name, score in scores.items()} == {"4_to_6_symbols": 3, "17_symbols": 3}
    for key, more in (("max_seq_len", "asks problems of up to 37 tokens"), ("max_output_tokens", "up to 18 tokens")):
        with pytest.raises(BadInputError, match=rf"file: model\.{key} = {sizes[key] - 1}: .*sources\.0\.task.*{more}"):
            parse_settings(TrainingConfig, values_for(task, **sizes | {key: sizes[key] - 1}), "file")


def test_a_stage_whose_rows_a_problem_does_not_fit_is_refused_unless_the_task_rests() -> None:
    values = values_for(Parity(max_length=20), max_seq_len=64)
    values["data"]["sources"][0]["name"] = "long"
    values["data"]["sources"].append({"name": "short", "task": {"kind": "parity", "max_length": 8}})
    values["data"]["stages"] = [
        {"from_tokens": 0, "sequence_length": 16, "weights": {"short": 1}},
        {"from_tokens": 1000},
    ]
    parse_settings(TrainingConfig, values, "file")
    values["data"]["stages"][0]["weights"]["long"] = 1
    with pytest.raises(BadInputError, match=r"stages\.0\.sequence_length = 16: .*sources\.0\.task has up to 23 tokens"):
        parse_settings(TrainingConfig, values, "file")
