"""A run saved by some ranks goes on with others: the same losses as if nothing had changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
from rank_pool import RankPool
from scenarios import Step, settings

from pretrain.universal_format import write_universal

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(300)]

STEPS = [Step(2 + number % 2) for number in range(20)]
TOLERANCE = 1e-5


def values_of(expert_parallel_size: int, zero_stage: int = 3, **parallel: int) -> dict[str, Any]:
    # Matrices and the rest are decayed differently, and strongly: groups that are confused show.
    return settings(
        parallel={"expert_parallel_size": expert_parallel_size, "zero_stage": zero_stage, **parallel},
        optim={"weight_decay": 0.5},
    )


def losses_change(trace: Any, unbroken: Any) -> float:
    """The largest relative difference of a step's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(trace.losses, unbroken.losses, strict=True))


def test_losses_go_on_on_any_number_of_ranks_and_expert_parallel_size(
    pool_of: Callable[[int], RankPool], tmp_path: Path
) -> None:
    for (ranks, size, zero_stage), targets in {
        (2, 2, 3): [(1, 1), (4, 2), (4, 4)],
        (4, 4, 3): [(2, 1)],
        (2, 2, 2): [(4, 4)],
        (2, 2, 1): [(1, 1)],
    }.items():
        folder = tmp_path / f"{ranks}_{size}_{zero_stage}"
        values = values_of(size, zero_stage)
        unbroken = pool_of(ranks).run(rank_jobs.save_and_continue, values=values, folder=folder, steps=STEPS)[0]
        write_universal(folder / "saved", folder / "universal")
        for other, other_size in targets:
            values = values_of(other_size, zero_stage)
            trace, state = pool_of(other).run(
                rank_jobs.reshape_and_continue, values=values, folder=folder, steps=STEPS
            )[0]
            case = f"ZeRO-{zero_stage}: {ranks} ranks, EP={size} to {other} ranks, EP={other_size}"
            assert losses_change(trace, unbroken) < TOLERANCE, case
            assert trace.norms == pytest.approx(unbroken.norms, rel=100 * TOLERANCE), case
            *groups, counts = state
            assert set(counts["steps"]) == {len(STEPS)}, case
            decays = {group["name"]: group["weight_decay"] for group in groups}
            assert all(decay == (0.0 if "not_decayed" in name else 0.5) for name, decay in decays.items()), decays


def test_losses_go_on_with_other_sub_groups(two_ranks: RankPool, tmp_path: Path) -> None:
    pieces, whole = values_of(2, sub_group_size=3000), values_of(2)
    unbroken = two_ranks.run(rank_jobs.save_and_continue, values=pieces, folder=tmp_path, steps=STEPS)[0]
    write_universal(tmp_path / "saved", tmp_path / "universal")
    groups = []
    for values in (whole, values_of(2, sub_group_size=9000)):
        trace, state = two_ranks.run(rank_jobs.reshape_and_continue, values=values, folder=tmp_path, steps=STEPS)[0]
        assert losses_change(trace, unbroken) < TOLERANCE
        assert set(state[-1]["steps"]) == {len(STEPS)}
        groups.append(len(state[-1]["steps"]))
    assert groups[0] < groups[1]


def test_what_deepspeed_alone_makes_of_a_universal_checkpoint(two_ranks: RankPool, tmp_path: Path) -> None:
    """Fact 7: the reasons for ``universal_format.mended``. When this fails, DeepSpeed has mended them: drop ours."""
    values = values_of(2)
    unbroken = two_ranks.run(rank_jobs.save_and_continue, values=values, folder=tmp_path, steps=STEPS)[0]
    write_universal(tmp_path / "saved", tmp_path / "universal")
    trace, state = two_ranks.run(
        rank_jobs.reshape_and_continue, values=values, folder=tmp_path, steps=STEPS, mend=False
    )[0]
    *groups, counts = state
    assert {group["weight_decay"] for group in groups} == {0.5}
    assert max(counts["steps"]) > len(STEPS)
    assert losses_change(trace, unbroken) > TOLERANCE
