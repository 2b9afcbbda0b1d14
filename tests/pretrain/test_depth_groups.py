"""A depth sweep by group: domains of texts and difficulties of tasks, in the command's table, file and picture."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.dataset.reader import Dataset
from launch.settings import parse_settings
from model import IceModel
from pretrain import evaluate
from pretrain.config import TrainingConfig
from pretrain.data import open_main
from pretrain.evaluate import RunEvaluation, default_depths, evaluate_run, main

SIZES: dict[str, Any] = {
    "dim": 32,
    "prelude_layers": 1,
    "coda_layers": 0,
    "max_loop_iters": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_experts": 0,
    "ffn_dim": 32,
    "max_seq_len": 64,
    "max_output_tokens": 16,
}


def run_of(monkeypatch: pytest.MonkeyPatch, path: Path, data: dict[str, Any], vocab_size: int) -> Path:
    """A run directory whose newest checkpoint has random weights."""
    values = {
        "model": {**SIZES, "vocab_size": vocab_size},
        "data": {"sequence_length": 32, "global_batch_size": 4, **data},
        "loop": {"distribution": "poisson", "mean_loops": 2, "max_loops": 3},
        "parallel": {"micro_batch_size": 4},
    }
    config = parse_settings(TrainingConfig, values, "test")
    torch.manual_seed(0)
    model, dataset = IceModel(config.model).eval(), open_main(config.data)
    checkpoint = path / "checkpoints" / "step_00000001"
    loaded = SimpleNamespace(
        config=config, model=model, dataset=dataset, tokenizer=dataset.tokenizer, checkpoint=checkpoint
    )
    monkeypatch.setattr(evaluate, "load_run", lambda _: loaded)
    return path


def test_a_text_is_judged_by_domain_at_each_depth(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = run_of(monkeypatch, tmp_path, {"path": str(dataset.folder)}, 300)
    evaluation = evaluate_run(run, [1, 3])
    assert [(group.source, group.group) for group in evaluation.groups] == [
        (dataset.folder.name, domain) for domain in "abc"
    ]
    check_against_losses(evaluation)
    for depth in (1, 3):
        whole = sum(group.by_loops[depth] * group.size for group in evaluation.groups)
        assert whole / evaluation.by_loops[depth].text_bytes == pytest.approx(evaluation.by_loops[depth].bits_per_byte)
    written = json.loads((run / "evaluation.json").read_text())
    assert written["trained_loops"] == [1, 3]
    assert written["groups"][1]["by_loops"]["3"] == evaluation.groups[1].by_loops[3]
    assert "exact_match" not in written


def check_against_losses(evaluation: RunEvaluation) -> None:
    for group in evaluation.groups:
        for depth, value in group.by_loops.items():
            whole = evaluation.by_loops[depth]
            losses = whole.by_source.get(group.source, whole)
            assert value == losses.bits_per_byte_by_domain[group.group]
            assert group.size == losses.text_bytes_by_domain[group.group]


def test_sources_of_a_mixture_have_their_own_domains_and_the_main_data_set_too_where_it_is_none(
    dataset: Dataset, dataset_maker: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = dataset_maker(tmp_path / "other", seed=9)
    sources = [
        {"name": "first", "path": str(dataset.folder), "domains": ["c", "a"]},
        {"name": "second", "path": str(dataset.folder), "domains": ["b"]},
    ]
    run = run_of(monkeypatch, tmp_path, {"sources": sources}, 300)
    evaluation = evaluate_run(run, [2])
    assert [(g.source, g.group) for g in evaluation.groups] == [("first", "a"), ("first", "c"), ("second", "b")]
    check_against_losses(evaluation)
    run = run_of(monkeypatch, tmp_path, {"path": str(other.folder), "sources": sources[1:]}, 300)
    evaluation = evaluate_run(run, [2])
    names = [(group.source, group.group) for group in evaluation.groups]
    assert names == [*((other.folder.name, domain) for domain in "abc"), ("second", "b")]
    check_against_losses(evaluation)


def test_a_task_is_judged_by_difficulty_below_and_beyond_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"kind": "copy", "min_length": 3, "max_length": 5, "length_groups": 1, "symbols": 3, "beyond": [8]}
    monkeypatch.setattr("pretrain.data.validation.HELD_OUT_PROBLEMS", 10)
    run = run_of(monkeypatch, tmp_path, {"sources": [{"name": "again", "task": task}], "document_mask": True}, 5)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["--run", str(run), "--sequences", "2", "--problems", "4"]) == 0
    written = json.loads((run / "evaluation.json").read_text())
    assert list(written["by_loops"]) == ["1", "2", "3", "4", "6"], "1, 2, T, 2T, the deepest trained and twice that"
    groups = {group["group"]: group for group in written["groups"]}
    assert list(groups) == ["3_to_5_symbols", "8_symbols"]
    assert [group["trained"] for group in groups.values()] == [True, False]
    for name, group in groups.items():
        assert (group["source"], group["measure"], group["size"]) == ("again", "accuracy", 4)
        for depth, accuracy in group["by_loops"].items():
            score = written["exact_match"][depth][f"again/{name}"]
            assert accuracy == score["accuracy"] == score["solved"] / 4
    printed = " ".join(capsys.readouterr().out.split())
    assert "8_symbols, beyond training" in printed
    for picture in ("depth.png", "depth_by_group.png"):
        assert (run / "plots" / picture).read_bytes().startswith(b"\x89PNG")


def test_depths_reach_beyond_training_where_it_is_known() -> None:
    assert default_depths(4, 8) == [1, 2, 4, 8, 16]
    assert default_depths(1, 1) == [1, 2]


@pytest.mark.parametrize(
    ("loop", "stages", "deepest"),
    [
        ({"distribution": "fixed"}, [], 4),
        ({"distribution": "fixed"}, [{"from_tokens": 0, "mean_loops": 6}], 6),
        ({"distribution": "poisson"}, [], 8),
        ({"distribution": "poisson", "max_loops": 5}, [], 5),
        ({"distribution": "uniform", "min_loops": 2}, [], 6),
        ({"distribution": "uniform"}, [{"from_tokens": 0, "mean_loops": 2}], 7),
        ({"distribution": "lognormal_poisson", "mean_loops": 1}, [{"from_tokens": 0, "mean_loops": 3}], 6),
    ],
)
def test_no_step_is_deeper_than_the_deepest(loop: dict[str, Any], stages: list[dict[str, Any]], deepest: int) -> None:
    from pretrain.loop_depth import sample_loops

    data = {"sequence_length": 32, "sources": [{"task": {"kind": "parity"}}], "stages": stages}
    values = {"model": {"vocab_size": 4}, "data": data, "loop": {"mean_loops": 4, **loop}}
    config = parse_settings(TrainingConfig, values, "test")
    assert config.deepest_step == deepest
    means = {config.mean_loops, *(stage.mean_loops or config.mean_loops for stage in config.data.stages)}
    drawn = {sample_loops(config.loop, mean, 0, step) for mean in means for step in range(2000)}
    assert max(drawn) == deepest
