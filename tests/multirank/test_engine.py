"""The engine on 2 and 4 ranks against plain torch in one process, and the facts about DeepSpeed that Ice rests on.

The facts are those of section 4 of the design; a DeepSpeed that changes one should fail here, not in a week's run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from rank_pool import RankFailedError, RankPool
from scenarios import BATCH, LENGTH, ROUTINGS, Step, Trace, reference, settings

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]

TOLERANCE = 1e-5
STEPS = [Step(3), Step(5, grad_loops=2), Step(1)]


@functools.cache
def reference_of(routing: str, truncated: bool = False) -> Trace:
    return reference(settings(routing), VARYING if truncated else STEPS, routing)


def assert_close(
    got: torch.Tensor, expected: torch.Tensor, what: str, floor: float = 1e-3, tolerance: float = TOLERANCE
) -> None:
    """Relative to the tensor's largest entry, or to ``floor``: the gradient of a scalar is a long sum that cancels."""
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} instead of {tuple(expected.shape)}"
    error = (got - expected).abs().max().item()
    assert error <= tolerance * max(floor, expected.abs().max().item()), f"{what}: off by {error:.2e}"


def assert_same_training(got: Trace, expected: Trace, whole_logits: bool = True, tolerance: float = TOLERANCE) -> None:
    """``tolerance`` is that of gradients and weights."""
    assert got.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert got.norms == pytest.approx(expected.norms, rel=TOLERANCE)
    for step, (load, expected_load) in enumerate(zip(got.loads, expected.loads, strict=True)):
        assert torch.equal(load, expected_load), f"expert load of step {step}"
    if whole_logits:
        assert got.logits is not None
        assert expected.logits is not None
        assert_close(got.logits, expected.logits, "logits")
    for step, (gradients, expected_gradients) in enumerate(zip(got.gradients, expected.gradients, strict=True)):
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            what = f"gradient of {name} in step {step}"
            assert_close(gradient, expected_gradients[name], what, tolerance=tolerance)
    assert got.weights.keys() == expected.weights.keys()
    for name, weight in got.weights.items():
        # One step moves a weight by about the learning rate, 0.01.
        assert_close(
            weight, expected.weights[name], f"{name} after {expected.weight_steps} clipped steps", 0.01, tolerance
        )


def assert_bitwise_equal(got: Trace, expected: Trace) -> None:
    assert got.losses == expected.losses
    assert got.norms == expected.norms
    assert all(map(torch.equal, got.loads, expected.loads))
    for gradients, expected_gradients in zip(got.gradients, expected.gradients, strict=True):
        assert all(torch.equal(gradients[name], expected_gradients[name]) for name in expected_gradients)
    assert all(torch.equal(got.weights[name], weight) for name, weight in expected.weights.items())


def test_the_reference_sees_what_the_scenarios_promise() -> None:
    for routing in ROUTINGS:
        trace = reference_of(routing)
        assert min(trace.norms) > 2 * 0.1, "clipping must bite"
        assert all(load.shape[:2] == (step.loops, 2) for load, step in zip(trace.loads, STEPS, strict=True))
    assert (reference_of("experts_without_tokens").loads[0][..., [1, 2, 6, 7]] == 0).all()
    assert (reference_of("all_tokens_to_one_expert").loads[0][..., 5] == BATCH * LENGTH).all()
    balanced = reference_of("ordinary").weights["core.blocks.0.ffn.router.e_score_correction_bias"]
    assert (balanced - torch.linspace(-0.05, 0.05, 8)).abs().max() == pytest.approx(0.03)


@pytest.mark.parametrize("expert_parallel_size", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_as_one_process(
    two_ranks: RankPool, zero_stage: int, expert_parallel_size: int
) -> None:
    parallel = {"zero_stage": zero_stage, "expert_parallel_size": expert_parallel_size}
    trace = two_ranks.run(rank_jobs.train, values=settings(parallel=parallel), steps=STEPS)[0]
    assert_same_training(trace, reference_of("ordinary"))


@pytest.mark.parametrize("routing", ROUTINGS[1:])
def test_extreme_routing_on_two_ranks_trains_as_one_process(two_ranks: RankPool, routing: str) -> None:
    values = settings(routing, parallel={"expert_parallel_size": 2})
    trace = two_ranks.run(rank_jobs.train, values=values, steps=STEPS, routing=routing)[0]
    assert_same_training(trace, reference_of(routing))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("expert_parallel_size", [1, 2, 4])
def test_expert_parallelism_on_four_ranks_trains_as_one_process(
    pool_of: Callable[[int], RankPool], expert_parallel_size: int, routing: str
) -> None:
    values = settings(routing, parallel={"expert_parallel_size": expert_parallel_size})
    trace = pool_of(4).run(rank_jobs.train, values=values, steps=STEPS, routing=routing)[0]
    assert_same_training(trace, reference_of(routing))


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"zero_init": True, "expert_parallel_size": 2}},
        {"parallel": {"expert_parallel_size": 2, "micro_batch_size": 4}, "loop": {"remat": "loop"}},
    ],
    ids=["weights_partitioned_while_built", "one_micro_batch_and_recomputed_loops"],
)
def test_how_a_step_is_computed_changes_nothing(two_ranks: RankPool, changes: dict[str, Any]) -> None:
    trace = two_ranks.run(rank_jobs.train, values=settings(**changes), steps=STEPS)[0]
    assert_same_training(trace, reference_of("ordinary"))


VARYING = [Step(3), Step(7, grad_loops=2), Step(1), Step(5, grad_loops=3), Step(2)]


def test_a_depth_that_changes_every_step_with_truncated_backpropagation_trains_as_one_process(
    two_ranks: RankPool,
) -> None:
    """Fact 7: no hang of ZeRO-3's prefetch trace, no lost gradient."""
    values = settings(parallel={"expert_parallel_size": 2}, loop={"remat": "loop"})
    trace = two_ranks.run(rank_jobs.train, values=values, steps=VARYING)[0]
    assert_same_training(trace, reference_of("ordinary", truncated=True))


@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_recomputation_changes_no_bit_and_counts_the_load_once(two_ranks: RankPool, expert_parallel_size: int) -> None:
    """Fact 5, at depths 1, 3 and 7."""
    parallel = {"expert_parallel_size": expert_parallel_size}
    steps = [Step(1), Step(3), Step(7)]
    stored, recomputed = (
        two_ranks.run(rank_jobs.train, values=settings(parallel=parallel, loop={"remat": policy}), steps=steps)[0]
        for policy in ("none", "loop")
    )
    assert_bitwise_equal(recomputed, stored)
    for load, step in zip(recomputed.loads, steps, strict=True):
        assert load.sum(-1).tolist() == [[BATCH * LENGTH * 2] * 2] * step.loops


def test_reentrant_checkpointing_of_a_looped_block_is_wrong_and_ours_is_right(two_ranks: RankPool) -> None:
    """Fact 4: why ``model/remat.py`` must stay non-reentrant."""
    values = settings(loop={"remat": "loop"})

    right = torch.cat([gradient.flatten() for gradient in reference_of("ordinary").gradients[0].values()])

    def error(leaf: bool, reentrant: bool) -> float:
        gradients = two_ranks.run(rank_jobs.gradients_with, values=values, loops=3, leaf=leaf, reentrant=reentrant)[0]
        got = torch.cat([gradients[name].flatten() for name in reference_of("ordinary").gradients[0]])
        return float((got - right).norm() / right.norm())

    assert error(leaf=True, reentrant=False) < TOLERANCE
    assert error(leaf=False, reentrant=False) < TOLERANCE
    assert error(leaf=False, reentrant=True) > 1000 * TOLERANCE, "DeepSpeed mended it: say so in the design"


def test_zero_3_refuses_deepspeeds_own_moe_layer(two_ranks: RankPool) -> None:
    """Fact 1: why expert parallelism goes through AutoEP."""
    for answer in two_ranks.run(rank_jobs.initialise_deepspeed_moe):
        assert "MoE" in answer
        assert answer != "accepted"


def test_autoep_refuses_to_balance_by_itself(two_ranks: RankPool) -> None:
    """Fact 6, its first half; that our buffer is kept and never enters a gate is what the scenarios compare."""
    for answer in two_ranks.run(rank_jobs.start_with_load_balance_coeff, values=settings()):
        assert "load_balance_coeff" in answer


def test_every_rank_draws_the_same_depths(two_ranks: RankPool) -> None:
    """Fact 8."""
    values = settings(loop={"distribution": "lognormal_poisson", "mean_loops": 6})
    first, second = two_ranks.run(rank_jobs.draw_depths, values=values, steps=200)
    assert first == second
    assert len(set(first)) > 3


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_bf16_stays_close_to_fp32_and_keeps_selection_biases_in_fp32(two_ranks: RankPool, zero_stage: int) -> None:
    values = settings(
        parallel={"expert_parallel_size": 2, "zero_stage": zero_stage, "micro_batch_size": 4},
        precision={"dtype": "bf16"},
    )
    trace, biases, weights = two_ranks.run(rank_jobs.train_16_bit, values=values, steps=STEPS)[0]
    expected = reference_of("ordinary")
    assert biases == {"torch.float32"}
    assert weights == "torch.bfloat16"
    assert trace.losses == pytest.approx(expected.losses, rel=0.01)
    assert trace.norms == pytest.approx(expected.norms, rel=0.1)
    untrained = reference(settings(), [])

    def move(trace: Trace) -> torch.Tensor:
        return torch.cat(
            [
                (weight.float() - untrained.weights[name]).flatten()
                for name, weight in sorted(trace.weights.items())
                if not name.endswith("_bias")
            ]
        )

    assert (move(trace) - move(expected)).norm() < 0.15 * move(expected).norm(), "the weights moved elsewhere"
    # Steps of 0.01 from 0.05 are exact to fp32's rounding only if no bf16 copy was ever written back.
    for name in (
        "core.blocks.0.ffn.router.e_score_correction_bias",
        "core.blocks.1.ffn.router.e_score_correction_bias",
    ):
        moved = (trace.weights[name] - torch.linspace(-0.05, 0.05, 8)) / 0.01
        assert (moved - moved.round()).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("zero_stage", "dtype"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (3, "bf16")]
)
def test_the_engines_files_continue_to_the_bit(
    two_ranks: RankPool, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    values = settings(
        parallel={"expert_parallel_size": 2, "zero_stage": zero_stage, "micro_batch_size": 4},
        loop={"remat": "loop"},
        precision={"dtype": dtype},
    )
    steps = [Step(2), Step(3)] * 2
    saved = two_ranks.run(rank_jobs.save_and_continue, values=values, folder=tmp_path, steps=steps)[0]
    loaded = two_ranks.run(rank_jobs.load_and_continue, values=values, folder=tmp_path, steps=steps)[0]
    assert_bitwise_equal(loaded, saved)


def test_zero_to_fp32_refuses_an_autoep_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    """Fact 7: why ``checkpoint.plain_weights`` exists.

    Its other half, what a universal checkpoint loses, is tests/multirank/test_elastic.py.
    """
    values = settings(parallel={"expert_parallel_size": 2})
    two_ranks.run(rank_jobs.save_and_continue, values=values, folder=tmp_path, steps=[Step(2), Step(3)])
    answer = two_ranks.run(rank_jobs.answer_of_zero_to_fp32, folder=tmp_path)[0]
    assert answer != "accepted"
    assert "AutoEP" in answer


def test_a_rank_that_raises_or_hangs_fails_with_its_stack(tmp_path: Path) -> None:
    """The pool's own promise: a broken collective shows where it stands and stops nothing else."""
    pool = RankPool(2, tmp_path)
    assert pool.run(rank_jobs.add_ranks) == [1, 1]
    with pytest.raises(RankFailedError, match="one_rank_waits_for_ever") as failure:
        pool.run(rank_jobs.one_rank_waits_for_ever, timeout_seconds=3)
    assert "in one_rank_waits_for_ever" in str(failure.value)
    assert not pool.alive
    (tmp_path / "again").mkdir()
    pool = RankPool(2, tmp_path / "again")
    with pytest.raises(RankFailedError, match="rank 1 raised"):
        pool.run(rank_jobs.second_rank_raises)
