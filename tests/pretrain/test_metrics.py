"""metrics.jsonl over interruptions, and the measures of expert load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.metrics import MetricsFile, expert_load_metrics, read_metrics


def test_a_resume_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, resumed_step=0)
    for step in range(1, 8):
        first.append({"step": step, "loss": float(step)})
    first.close()
    resumed = MetricsFile(path, resumed_step=4)
    resumed.append({"step": 5, "loss": 50.0})
    resumed.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    MetricsFile(path, resumed_step=1).close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_non_finite_numbers_are_written_as_null(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    log.append({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_balanced_load_scores_one_and_collapse_in_one_loop_shows() -> None:
    even = torch.full((2, 1, 4), 10)
    assert expert_load_metrics(even) == {
        "expert_load_max_over_mean": 1.0,
        "expert_load_worst_loop": 1.0,
        "experts_unused": 0.0,
    }
    # Each loop collapses onto two experts of its own: the sum over loops is even all the same.
    collapsed = torch.tensor([[[20, 20, 0, 0]], [[0, 0, 20, 20]]])
    metrics = expert_load_metrics(collapsed)
    assert metrics["expert_load_max_over_mean"] == pytest.approx(1.0)
    assert metrics["expert_load_worst_loop"] == pytest.approx(2.0)
    assert metrics["experts_unused"] == pytest.approx(0.5)


def test_an_evaluation_that_is_due_again_is_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 3.0}, {"step": 1, "validation_bits_per_byte": 2.0}, {"step": 2, "loss": 2.0}]
    lines.append({"step": 2, "validation_bits_per_byte": 1.5})
    for due, kept in ((False, lines), (True, lines[:3])):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        MetricsFile(path, 2, evaluation_due=due).close()
        assert read_metrics(path) == kept
