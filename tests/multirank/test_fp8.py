"""FP8 in the engine: sharded, spread and recomputed weights multiply as whole ones do, and checkpoints fit all recipes.

Rounding to eight bits is not continuous, so a sum in another order may change a number by a sixteenth: what is compared
across topologies agrees to a part of FP8's own error, what is computed by the same sums to the bit.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import fp8_jobs
import pytest
import rank_jobs
import torch
from rank_pool import RankPool
from scenarios import BATCH, LENGTH, Step, Trace, reference, settings

from pretrain.universal_format import write_universal

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]

STEPS = [Step(3), Step(2)]


def fp8_settings(recipe: str, remat: str = "none", **parallel: Any) -> dict[str, Any]:
    return settings(
        model={"n_shared_experts": 1},
        parallel={"expert_parallel_size": 2, "micro_batch_size": 4, **parallel},
        loop={"remat": remat},
        precision={"dtype": "fp32", "recipe": recipe},
    )


def distance(got: Trace, expected: Trace) -> float:
    """Of the first step's gradients, relative."""

    def flat(trace: Trace) -> torch.Tensor:
        return torch.cat([gradient.flatten() for _, gradient in sorted(trace.gradients[0].items())])

    return float((flat(got) - flat(expected)).norm() / flat(expected).norm())


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise"])
def test_a_recipe_trains_sharded_spread_and_recomputed_as_in_one_process(two_ranks: RankPool, recipe: str) -> None:
    # Together the two recipes see all policies that the engine's layer takes part in.
    policy = {"fp8_rowwise": "dispatch", "fp8_blockwise": "sqrt"}[recipe]
    stored, said = two_ranks.run(fp8_jobs.train_and_say, values=fp8_settings(recipe), steps=STEPS)[0]
    values = fp8_settings(recipe, policy, zero_init=True)
    recomputed, _ = two_ranks.run(fp8_jobs.train_and_say, values=values, steps=STEPS)[0]
    assert said == [
        f"{recipe} emulated: this CPU has no 8-bit products; numerics of FP8, no speed; "
        "FP8 multiplies in 16 linear layers and the routed experts"
    ]
    assert recomputed.losses == stored.losses
    assert recomputed.norms == pytest.approx(stored.norms, rel=1e-14)  # zero.Init orders the sum of squares otherwise
    for name, gradient in stored.gradients[1].items():
        assert torch.equal(recomputed.gradients[1][name], gradient), name

    high = reference(fp8_settings("bf16"), STEPS)
    alone = reference(fp8_settings(recipe), STEPS)
    assert stored.losses == pytest.approx(alone.losses, rel=1e-4)
    assert distance(stored, alone) < 0.1 * distance(stored, high), "another rounding than in one process"
    assert 0.002 < distance(stored, high) < 0.05, "this is not FP8"


def test_fp8_pins_no_gathered_weights(two_ranks: RankPool) -> None:
    """Fact 11's pitfall: ZeRO-3 gives weights back after the forward, so nothing may hold them until the backward."""
    for recipe in ("fp8_rowwise", "fp8_blockwise"):
        values = fp8_settings(recipe, expert_parallel_size=1)  # with 2, a rank's experts are its own and never gathered
        for counts in two_ranks.run(fp8_jobs.storages_after_forward, values=values, as_views=False):
            assert counts["linears"][0] >= 16
            assert counts["experts"][0] >= 12
            assert counts["linears"][1] == counts["experts"][1] == 0, counts
    for counts in two_ranks.run(fp8_jobs.storages_after_forward, values=values, as_views=True):
        assert counts["linears"][1] > 0, "views pin nothing any more: this test cannot fail"
        assert counts["experts"][1] > 0, "views pin nothing any more: this test cannot fail"


@pytest.mark.parametrize(("saved", "loaded"), [("fp8_rowwise", "bf16"), ("bf16", "fp8_blockwise")])
def test_a_checkpoint_continues_in_another_recipe(two_ranks: RankPool, tmp_path: Path, saved: str, loaded: str) -> None:
    steps = [Step(2), Step(3)] * 2
    before = two_ranks.run(rank_jobs.save_and_continue, values=fp8_settings(saved), folder=tmp_path, steps=steps)[0]
    after = two_ranks.run(rank_jobs.load_and_continue, values=fp8_settings(loaded), folder=tmp_path, steps=steps)[0]
    assert after.losses == pytest.approx(before.losses, rel=2e-3)
    assert after.losses != before.losses, "the recipe made no difference"
    for name, weight in before.weights.items():
        assert after.weights[name].dtype == weight.dtype
        assert after.weights[name].shape == weight.shape


@pytest.mark.parametrize(("saved", "loaded"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_checkpoint_continues_in_another_dtype(two_ranks: RankPool, tmp_path: Path, saved: str, loaded: str) -> None:
    """In the universal format, which holds the fp32 master weights and moments whatever the run's dtype."""
    steps = [Step(2), Step(3)] * 3

    def values(dtype: str) -> dict[str, Any]:
        return {**fp8_settings("fp8_rowwise"), "precision": {"dtype": dtype, "recipe": "fp8_rowwise"}}

    before = two_ranks.run(rank_jobs.save_and_continue, values=values(saved), folder=tmp_path, steps=steps)[0]
    write_universal(tmp_path / "saved", tmp_path / "universal")
    after, _ = two_ranks.run(rank_jobs.reshape_and_continue, values=values(loaded), folder=tmp_path, steps=steps)[0]
    assert after.losses == pytest.approx(before.losses, rel=1e-3)
    assert after.norms == pytest.approx(before.norms, rel=0.01)


def test_rows_in_eight_bits_on_the_wire_change_no_block_wise_forward_and_save_bytes(two_ranks: RankPool) -> None:
    def run(**parallel: Any) -> tuple[Trace, list[str], Counter[str]]:
        values = fp8_settings("fp8_blockwise", "dispatch", **parallel)
        answers = two_ranks.run(fp8_jobs.train_and_count_rows_sent, values=values, steps=[Step(3)])
        return *answers[0][:2], sum((Counter(answer[2]) for answer in answers), Counter())

    wide, said, wide_bytes = run()
    assert len(said) == 1
    narrow, said, narrow_bytes = run(fp8_dispatch=True)
    assert said[1] == "rows travel to their experts in 8 bits, and back in fp32"
    assert torch.equal(narrow.logits, wide.logits)
    assert 0 < distance(narrow, wide) < 0.02, "weight gradients read rounded rows"
    # Each loop's layers send every choice of every token four times: there, back, and the gradients of both.
    rows = 3 * 2 * BATCH * LENGTH * 2
    width = 32
    assert wide_bytes == {"float32": 4 * rows * 4 * width, "int32": wide_bytes["int32"]}
    # One of the four is a byte a number, and one for the scale, instead of four.
    assert narrow_bytes == {"float32": 3 * rows * 4 * width, "uint8": rows * (width + 1), "int32": wide_bytes["int32"]}
