"""Which checkpoints stay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fake_engine import Run

from pretrain.checkpoint import commit as commit_module
from pretrain.checkpoint.layout import step_of
from pretrain.checkpoint.retention import superseded
from pretrain.config import CheckpointSection


def test_the_last_ones_and_the_chosen_multiples_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 10):
        run.save(step)
    assert run.folders == [f"step_{step:08d}" for step in (4, 8, 9)]


def test_the_best_by_evaluation_are_kept_and_a_resume_does_not_forget_them(tmp_path: Path) -> None:
    values = {2: 1.5, 4: 1.2, 6: 1.9, 8: 1.4, 10: 1.3, 12: 1.6}
    for step in range(1, 14):
        run = Run(tmp_path, keep_last=1, keep_best=2)  # a start for each
        run.save(step, validation_bits_per_byte=values.get(step))
    assert run.steps == [4, 10, 13]


def test_of_equal_values_the_newest_is_the_best_and_a_step_without_value_is_never_among_them(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1, keep_best=1)
    for step, value in ((1, 1.0), (2, None), (3, 1.0), (4, None), (5, float("nan")), (6, 2.0)):
        run.save(step, validation_bits_per_byte=value)
    assert run.steps == [3, 6]


def test_what_is_kept_is_what_a_list_written_by_hand_would_keep(tmp_path: Path) -> None:
    """Against a reference that knows nothing of folders, for random settings and values."""
    for round_ in range(20):
        generator = random.Random(round_)
        steps = sorted(generator.sample(range(1, 200), 12))
        values = {step: generator.choice([None, generator.random(), 0.5]) for step in steps}
        folders = []
        for step in steps:
            folder = tmp_path / str(round_) / f"step_{step:08d}"
            folder.mkdir(parents=True)
            state = {"step": step, "next_sample": 0, "tokens": 0, "wandb_id": None}
            (folder / "state.json").write_text(json.dumps({**state, "validation_bits_per_byte": values[step]}))
            folders.append(folder)
        last, every, best = generator.randrange(1, 4), generator.choice([None, 5]), generator.choice([None, 1, 3])
        proven = generator.choice(folders)
        section = CheckpointSection(keep_last=last, keep_every=every, keep_best=best)

        kept = set(steps[-last:]) | {step_of(proven)}
        if every:
            kept |= {step for step in steps if step % every == 0}
        ranking: list[tuple[float, int]] = sorted((value, -step) for step, value in values.items() if value is not None)
        kept |= {-negative for _, negative in ranking[: best or 0]}
        doomed = [step_of(folder) for folder in superseded(folders, section, [proven])]
        assert doomed == [step for step in steps if step not in kept]


def test_without_reading_back_the_checkpoint_that_was_proven_by_a_resume_stays(tmp_path: Path) -> None:
    """A manifest is no proof that the bytes hold: the one whose hashes were seen to hold is not given up for it."""
    run = Run(tmp_path, keep_last=1, verify_writes=False)
    run.save(1)
    again = Run(tmp_path, keep_last=1, verify_writes=False)
    for step in (2, 3, 4):
        again.save(step)
    assert again.steps == [1, 4]
    verified = Run(tmp_path, keep_last=1)
    verified.save(5)
    assert verified.steps == [5]


def test_a_damaged_state_is_not_among_the_best_and_does_not_stop_a_save(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1, keep_best=1)
    run.save(1, validation_bits_per_byte=1.0)
    (run.checkpoints / "step_00000001" / "state.json").write_text("{")
    run.save(2)
    assert run.checkpointer.wait()
    assert run.steps == [2]


def test_a_folder_that_cannot_be_removed_is_named_and_the_save_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, keep_last=1)
    run.save(1)

    def refuse(_: Path) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(commit_module, "remove", refuse)
        run.save(2)
        assert run.checkpointer.wait()
    run.save(3)
    assert any("step_00000001 could not be removed" in line for line in run.said)
    assert run.folders == ["step_00000003"]
