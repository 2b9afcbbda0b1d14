"""Apex, RR-SLM and the plain core on ZeRO-3, against one process; and a whole run on a task, cut, resumed, scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from rank_pool import RankPool
from scenarios import LENGTH, VOCABULARY, Step, reference, settings
from test_engine import assert_bitwise_equal, assert_same_training
from test_mixture_training import same_steps, steps_of

from pretrain.evaluate import evaluate_run
from pretrain.generate import main as generate

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(500)]

SIZES = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "max_seq_len": LENGTH,
    "max_output_tokens": LENGTH,
    "prelude_layers": 1,
    "recurrent_layers": 2,
    "coda_layers": 0,
    "max_loop_iters": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_dim": 64,
    "n_experts": 0,
    "expert_dim": 16,
}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "apex": {
        "model": {**SIZES, "core": "apex", "sliding_window": 5, "full_attention_every": 4, "memory_slots": 3},
        "loop": {"apex": {"verification_weight": 0.1, "correctness_weight": 0.3, "consistency_weight": 0.1}},
    },
    "refine": {"model": {**SIZES, "core": "refine", "convergence_eps": 0.35}},
    "refine_with_experts": {
        "model": {**SIZES, "core": "refine", "convergence_eps": 0.35, "n_experts": 8, "n_experts_per_tok": 2},
        "parallel": {"expert_parallel_size": 2},
    },
    "plain": {"model": {**SIZES, "core": "plain"}},
}
STEPS = [Step(3, shallow=2), Step(5, grad_loops=2, shallow=3), Step(2, shallow=1), Step(3, shallow=1)]


def settings_of(family: str) -> dict[str, Any]:
    sections = deepcopy(FAMILIES[family])
    sections.setdefault("loop", {}).update(remat="loop", min_loops=2)
    # The reference in one process has whole logits.
    sections["parallel"] = {**sections.get("parallel", {}), "micro_batch_size": 2, "loss_chunk_tokens": 7}
    return settings(**sections)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_on_ranks_as_in_one_process(two_ranks: RankPool, family: str) -> None:
    values, steps = settings_of(family), STEPS[:3]
    if family == "plain":  # whose input is read before the first loop only
        steps = [replace(step, grad_loops=None) for step in steps]
    trace = two_ranks.run(rank_jobs.train, values=values, steps=steps)[0]
    expected = reference(values, steps)
    assert_same_training(trace, expected, whole_logits=False)
    for name in expected.gradients[0]:
        assert any((gradients[name] != 0).any() for gradients in expected.gradients), f"{name} learns nothing"


@pytest.mark.parametrize("family", ["apex", "refine_with_experts"])
def test_a_family_resumed_is_the_run_that_never_stopped(two_ranks: RankPool, tmp_path: Path, family: str) -> None:
    values = settings_of(family)
    unbroken = two_ranks.run(rank_jobs.save_and_continue, values=values, folder=tmp_path, steps=STEPS)[0]
    resumed = two_ranks.run(rank_jobs.load_and_continue, values=values, folder=tmp_path, steps=STEPS)[0]
    assert_bitwise_equal(resumed, unbroken)


@pytest.mark.parametrize("family", ["apex", "refine_with_experts"])
def test_depth_adds_no_gathers_and_convergence_takes_no_collective_away(two_ranks: RankPool, family: str) -> None:
    values = settings_of(family)
    by_depth = two_ranks.run(rank_jobs.traffic_by_depth, values=values, depths=[2, 6])[0]
    assert by_depth[2]["parameter_gather"] == by_depth[6]["parameter_gather"]
    if family == "refine_with_experts":
        settled = deepcopy(values)
        settled["model"]["convergence_eps"] = 100.0  # every position has converged after one iteration
        at_once = two_ranks.run(rank_jobs.traffic_by_depth, values=settled, depths=[6])[0]
        assert {kind: traffic.calls for kind, traffic in at_once[6].items()} == {
            kind: traffic.calls for kind, traffic in by_depth[6].items()
        }


@pytest.fixture(scope="module")
def task_values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 6 steps on sums of one and two digits, the second kind from the third step on.

    It is asked sums of ten digits, too, which are longer than a training row.
    """
    folder = tmp_path_factory.mktemp("task")
    sources = [
        {"name": "two", "task": {"kind": "addition", "min_digits": 2, "max_digits": 2, "beyond": [10]}},
        {"name": "one", "task": {"kind": "addition", "max_digits": 1, "validation_fraction": 0.2}},
    ]
    stages = [
        {"from_tokens": 0, "weights": {"one": 1}},
        {"from_tokens": 2 * 8 * 24, "weights": {"two": 1, "one": 1}},
    ]
    model = {**SIZES, "core": "refine", "vocab_size": 13, "convergence_eps": 0.2, "max_seq_len": 35}
    return {
        "run": {"dir": str(folder / "runs"), "seed": 5},
        "model": {**model, "max_output_tokens": 12},
        "data": {
            "sources": sources,
            "stages": stages,
            "document_mask": True,
            "sequence_length": 24,
            "global_batch_size": 8,
        },
        "optim": {"lr": 0.01},
        "schedule": {"kind": "constant", "steps": 6, "warmup_steps": 2},
        "loop": {"distribution": "uniform", "mean_loops": 2, "max_loops": 3},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 3, "micro_batch_size": 2},
        "checkpoint": {"every": 3},
        "eval": {"every": 100, "sequences": 16},
        "logging": {"wandb": "disabled", "tensorboard": False, "plot": False},
    }


def changed(values: dict[str, Any], name: str, **schedule: Any) -> dict[str, Any]:
    result = deepcopy(values)
    result["run"]["name"] = name
    result["schedule"] |= schedule
    return result


def lines_of(values: dict[str, Any], name: str) -> list[dict[str, Any]]:
    path = Path(values["run"]["dir"]) / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_task_is_trained_cut_resumed_and_scored(
    task_values: dict[str, Any],
    two_ranks: RankPool,
    pool_of: Callable[[int], RankPool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = rank_jobs.train_and_record_batches
    unbroken = steps_of(two_ranks.run(job, values=changed(task_values, "unbroken")))
    begun = steps_of(two_ranks.run(job, values=changed(task_values, "cut", steps=3)))
    resumed = steps_of(two_ranks.run(job, values=changed(task_values, "cut")))
    assert same_steps([*begun, *resumed], unbroken)
    same = ("step", "loss", "lr", "grad_norm", "loops", "tokens", "next_sample", "loop_residual", "loops_used")
    runs = [
        [{key: line[key] for key in same} for line in lines_of(task_values, name) if "loss" in line]
        for name in ("cut", "unbroken")
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 6

    alone = steps_of(pool_of(1).run(job, values=changed(task_values, "alone")))
    assert same_steps(alone, unbroken)
    losses = [[line["loss"] for line in lines_of(task_values, name) if "loss" in line] for name in ("alone", "cut")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    run = Path(task_values["run"]["dir"]) / "unbroken"
    last = lines_of(task_values, "unbroken")[-1]
    evaluation = evaluate_run(run, [1, 3], sequences=16)
    assert set(evaluation.by_loops[1].by_source) == {"two", "one"}
    assert last["validation_bits_per_byte/source/one"] > 0
    assert last["validation_bits_per_byte/10_digits"] > 0
    for scores in evaluation.exact_match.values():
        assert list(scores) == ["two/2_digits", "two/10_digits", "one/1_digits"]
        assert all(0 <= score.solved <= score.problems for score in scores.values())
    assert evaluation.exact_match[1]["one/1_digits"].loops_used == 1
    assert 1 <= (evaluation.exact_match[3]["one/1_digits"].loops_used or 0) <= 3
    written = json.loads((run / "evaluation.json").read_text())
    assert written["exact_match"]["3"]["two/2_digits"]["problems"] > 100
    assert generate(["--run", str(run), "--prompt", "1+2=", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("1+2=")
