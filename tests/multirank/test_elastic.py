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


def values_of(expert_parallel_size: int, zero_stage: int = 3) -> dict[str, Any]:
    # Matrices and the rest are decayed differently, and strongly: groups that are confused show.
    return settings(
        parallel={"expert_parallel_size": expert_parallel_size, "zero_stage": zero_stage},
        optim={"weight_decay": 0.5},
    )


@pytest.mark.parametrize("zero_stage", [3, 2, 1])
def test_losses_go_on_on_any_number_of_ranks_and_expert_parallel_size(
    zero_stage: int, pool_of: Callable[[int], RankPool], tmp_path: Path
) -> None:
    targets = [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)] if zero_stage == 3 else [(1, 1), (4, 4)]
    for ranks, size in [(2, 2), *([(4, 4)] if zero_stage == 3 else [])]:
        folder = tmp_path / f"{ranks}_{size}"
        values = values_of(size, zero_stage)
        unbroken = pool_of(ranks).run(rank_jobs.save_and_continue, values=values, folder=folder, steps=STEPS)[0]
        write_universal(folder / "saved", folder / "universal")
        for other, other_size in targets if ranks == 2 else [(2, 2), (2, 1)]:
            values = values_of(other_size, zero_stage)
            trace, state = pool_of(other).run(
                rank_jobs.reshape_and_continue, values=values, folder=folder, steps=STEPS
            )[0]
            case = f"{ranks} ranks, EP={size} to {other} ranks, EP={other_size}"
            print(case, max(abs(a - b) / abs(b) for a, b in zip(trace.losses, unbroken.losses, strict=True)))
            assert trace.losses == pytest.approx(unbroken.losses, rel=TOLERANCE), case
            assert trace.norms == pytest.approx(unbroken.norms, rel=100 * TOLERANCE), case
            *groups, counts = state
            assert set(counts["steps"]) == {len(STEPS)}, case
            decays = {group["name"]: group["weight_decay"] for group in groups}
            assert sorted(set(decays.values())) == [0.0, 0.5], case
