"""The checkpointer on two ranks with the real engine: writes behind training, one rank that fails, made-up files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_jobs
import pytest
import torch
from rank_pool import RankPool
from scenarios import Step, settings

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(500)]


def values_of(zero_stage: int = 3, **checkpoint: Any) -> dict[str, Any]:
    values = settings(
        parallel={"expert_parallel_size": 2, "zero_stage": zero_stage, "micro_batch_size": 4}, loop={"remat": "loop"}
    )
    return {**values, "checkpoint": checkpoint}


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_checkpoint_written_while_training_goes_on_is_the_state_at_its_step(
    two_ranks: RankPool, tmp_path: Path, zero_stage: int
) -> None:
    """Every byte is written after the steps that follow; a resume must give just these steps, to the bit."""
    values, steps = values_of(zero_stage), [Step(2), Step(3)] * 2
    saved, commits = two_ranks.run(checkpoint_jobs.save_behind_training, values=values, run=tmp_path, steps=steps)[0]
    assert commits == [0, 1]
    resumed = two_ranks.run(checkpoint_jobs.resume_and_train, values=values, run=tmp_path, steps=steps)[0]
    assert resumed.losses == saved.losses
    assert resumed.norms == saved.norms
    assert resumed.weights.keys() == saved.weights.keys()
    for name, weight in saved.weights.items():  # the selection biases are among them
        assert torch.equal(resumed.weights[name], weight), name


def test_when_one_rank_cannot_write_or_the_run_is_taken_over_all_ranks_learn_the_same(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    first, second = two_ranks.run(checkpoint_jobs.fail_on_one_rank, values=values_of(), run=tmp_path)
    assert first == second
    said, outcomes, stale = first
    assert outcomes == [False, True]
    assert len(said) == 1
    assert "step 1 could not be written: rank 1: OSError: [Errno 28] No space left on device" in said[0]
    assert stale.startswith("StaleRunError: ")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {name for name in names if name.startswith("step_")} == {"step_00000002"}


def test_a_malicious_pickle_in_any_file_is_refused_by_all_ranks_and_not_executed(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    arguments = {"values": values_of(plain_weights=False), "mark": mark}
    first, second = two_ranks.run(checkpoint_jobs.refuse_malicious_files, run=tmp_path / "run", **arguments)
    assert first == second
    assert {name.split("_")[-2] for name in first if name.startswith("engine/")} == {"model", "optim"}
    assert {"rank_00000.pt", "rank_00001.pt"} < first.keys()
    for name, answer in first.items():
        assert answer.startswith("BadInputError"), (name, answer)
        assert f"{name} asks for posix.mkdir" in answer
        assert "\n" not in answer
    for answer in two_ranks.run(checkpoint_jobs.load_malicious_file_by_the_engine, run=tmp_path / "run", **arguments):
        assert "UnpicklingError" in answer, "the second line of defence"
    assert not mark.exists()
