"""lm-evaluation-harness on a model of ours: what it is told equals what a naive computation gives, at any depth."""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.harness
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from data_pipeline.tokenizer.bpe import END_ID, SentencePieceTokenizer, train_tokenizer  # noqa: E402
from launch.settings import BadInputError  # noqa: E402
from model import IceConfig, IceModel  # noqa: E402
from pretrain import evaluate, harness  # noqa: E402
from pretrain.harness import HarnessModel, HarnessOptions, evaluate_tasks  # noqa: E402

LINES = [f"The captain of ship {number} wrote to the harbour about {number * 7} barrels." for number in range(200)]
VOCABULARY, LENGTH = 352, 48
CHOICES = ["barrels", "the harbour", "a captain of ship 12", "7"]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_tokenizer(LINES, VOCABULARY))


@pytest.fixture(scope="module")
def model() -> IceModel:
    torch.manual_seed(0)
    small = {"vocab_size": VOCABULARY, "dim": 32, "max_seq_len": LENGTH, "max_output_tokens": 24}
    model = IceModel(IceConfig.model_validate(IceConfig(sliding_window=16).scaled_down().model_dump() | small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


@torch.no_grad()
def naive_log_p(model: IceModel, read: list[int], wanted: list[int], loops: int) -> tuple[float, bool]:
    """One sequence, one token at a time, the whole past read again for each."""
    total, greedy = 0.0, True
    for number, token in enumerate(wanted):
        past = [*read, *wanted[:number]][-LENGTH:]
        log_p = model(torch.tensor([past]), loops)[0, -1].double().log_softmax(-1)
        total += float(log_p[token])
        greedy &= int(log_p.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("loops", [1, 3])
def test_likelihoods_are_those_of_a_naive_computation(
    model: IceModel, tokenizer: SentencePieceTokenizer, loops: int
) -> None:
    asked = [("The captain", f" {choice}") for choice in CHOICES]
    asked += [("", "The captain"), ("about 14 ", "barrels"), ("x " * 40, "y z"), ("of ship", " 7")]
    # What greedy decoding writes must be found to be greedy.
    start = [END_ID, *tokenizer.encode("The captain")]
    written = model.generate(torch.tensor([start]), 3, loops, temperature=0.0)[0, len(start) :].tolist()
    judged = HarnessModel(model, tokenizer, loops, batch_size=3)
    scores = judged.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(asked, scores, strict=True):
        context, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
        read = tokenizer.encode(context)
        wanted = tokenizer.encode(context + continuation)[len(read) :]
        expected, expected_greedy = (
            naive_log_p(model, [END_ID, *read], wanted, loops)
            if len(read) < 40
            # The naive past slides as tokens are added; a forward of the last LENGTH tokens does not.
            else (forward_log_p(model, [END_ID, *read], wanted, loops))
        )
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy
    ((log_p, greedy),) = judged._loglikelihood_tokens([(("a", "b"), start, written)], disable_tqdm=True)
    assert greedy
    assert log_p == pytest.approx(naive_log_p(model, start, written, loops)[0], abs=1e-4)


@torch.no_grad()
def forward_log_p(model: IceModel, read: list[int], wanted: list[int], loops: int) -> tuple[float, bool]:
    """A text that is too long: its last ``LENGTH`` inputs, in one forward."""
    inputs = [*read, *wanted][:-1][-LENGTH:]
    log_p = model(torch.tensor([inputs]), loops)[0, -len(wanted) :].double().log_softmax(-1)
    right = torch.tensor(wanted)
    return float(log_p[torch.arange(len(wanted)), right].sum()), bool((log_p.argmax(-1) == right).all())


def test_rolling_likelihoods_count_every_token_once(model: IceModel, tokenizer: SentencePieceTokenizer) -> None:
    long = " ".join(LINES[:8])
    assert len(tokenizer.encode(long)) > 2 * LENGTH
    texts = [(LINES[0],), (long,), ("a",)]
    judged = HarnessModel(model, tokenizer, 2, batch_size=4)
    got = judged.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    for (text,), log_p in zip(texts, got, strict=True):
        ids = tokenizer.encode(text)
        # Windows of LENGTH tokens; the last is moved back so that it is full, and counts new ones only.
        expected = 0.0
        for start in range(0, len(ids), LENGTH):
            end = min(start + LENGTH, len(ids))
            first = max(0, end - LENGTH)
            read = [END_ID, *ids][first:end]
            expected += forward_log_p(model, read[: len(read) - (end - start) + 1], ids[start:end], 2)[0]
        assert log_p == pytest.approx(expected, abs=1e-3)


def test_generation_is_that_of_each_prompt_alone(model: IceModel, tokenizer: SentencePieceTokenizer) -> None:
    prompts = ["The captain", "about", "of ship 7 wrote to the harbour", "x" * 100]
    plain = {"until": [], "max_gen_toks": 12}
    judged = HarnessModel(model, tokenizer, 2, batch_size=3)
    texts = judged.generate_until(instances("generate_until", [(p, plain) for p in prompts]), disable_tqdm=True)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = [END_ID, *tokenizer.encode(prompt)][-(LENGTH - 12) :]
        new = model.generate(torch.tensor([ids]), 12, 2, temperature=0.0, stop_token_ids={END_ID})[0, len(ids) :]
        expected = tokenizer.decode(new.tolist())
        assert text == expected
        # A stop string in the middle, across tokens: everything before its first place.
        stop = expected[4:7]
        asked = (prompt, {"until": [stop, "never"], "max_gen_toks": 12})
        (stopped,) = judged.generate_until(instances("generate_until", [asked]), disable_tqdm=True)
        assert stopped == expected[: expected.find(stop)]
    assert len(set(texts)) > 1
    sampled = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "max_gen_toks": 12}
    request = instances("generate_until", [(prompts[0], sampled)])
    assert judged.generate_until(request, disable_tqdm=True) == judged.generate_until(request, disable_tqdm=True)
    with pytest.raises(BadInputError, match=r"generation_kwargs: num_beams = 4: is not known; accepted: .*until"):
        judged.generate_until(instances("generate_until", [("a", {"num_beams": 4})]))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A multiple-choice, a generation and a perplexity task in local files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"The captain of ship {number}", "choices": CHOICES, "answer": number % 4, "text": LINES[number]}
        for number in range(7)
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    common = {**data, "test_split": "test", "metadata": {"version": 1}}
    written: dict[str, dict[str, Any]] = {
        "ships_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "ships_write": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        "ships_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, task in written.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))  # JSON is YAML
    return folder


def test_tasks_from_local_files_give_the_metrics_of_a_naive_computation(
    model: IceModel, tokenizer: SentencePieceTokenizer, tasks: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tasks / "cache"))
    loaded = SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        checkpoint=Path("step_00000001"),
        config=SimpleNamespace(mean_loops=2, run=SimpleNamespace(seed=0)),
    )
    monkeypatch.setattr(evaluate, "load_run", lambda run: loaded)
    names = "ships_choice,ships_write,ships_text"
    arguments = [
        "--run",
        str(tasks),
        "--tasks",
        names,
        "--task-path",
        str(tasks),
        "--loops",
        "1,3",
        "--batch-size",
        "5",
    ]
    assert evaluate.main(arguments) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    report = json.loads((tasks / "harness.json").read_text())["by_loops"]
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    for loops in (1, 3):
        right, bits, size = 0, 0.0, 0
        for row in rows:
            read = tokenizer.encode(row["question"])
            scores = []
            for choice in CHOICES:
                wanted = tokenizer.encode(f"{row['question']} {choice}")[len(read) :]
                scores.append(forward_log_p(model, [END_ID, *read], wanted, loops)[0])
            right += scores.index(max(scores)) == row["answer"]
            bits -= forward_log_p(model, [END_ID], tokenizer.encode(row["text"]), loops)[0] / math.log(2)
            size += len(row["text"].encode())
        numbers = report[str(loops)]
        assert numbers["ships_choice"]["acc,none"] == pytest.approx(right / len(rows))
        assert numbers["ships_text"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-4)
        assert numbers["ships_write"]["exact_match,none"] == 0
    one, three = (report[depth]["ships_text"]["bits_per_byte,none"] for depth in ("1", "3"))
    assert abs(one - three) > 1e-3, "depth changes nothing here: the test is blind"


def test_an_unknown_task_is_named(
    model: IceModel, tokenizer: SentencePieceTokenizer, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness's own tasks take long to look through.
    monkeypatch.setattr(harness, "TaskManager", partial(TaskManager, include_path=str(tasks), include_defaults=False))
    with pytest.raises(BadInputError, match=r"^--tasks no_such_task: is no task of lm-evaluation-harness"):
        evaluate_tasks(model, tokenizer, [1], HarnessOptions(["no_such_task"]))
    with pytest.raises(BadInputError, match=r"^--task-path .*nowhere: no such folder"):
        evaluate_tasks(model, tokenizer, [1], HarnessOptions(["any"], tasks / "nowhere"))


def test_without_the_harness_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "pretrain.harness")
    with pytest.raises(
        BadInputError, match=r"^--tasks: lm_eval is not installed; pip install -c constraints.txt lm-eval"
    ):
        evaluate.main(["--run", str(tmp_path), "--tasks", "any"])
