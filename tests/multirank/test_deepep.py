"""``parallel.comm_backend = "deepep"`` on two ranks, DeepEP's place taken by a stand-in over gloo, ``fake_deep_ep.py``.

What is tested is our side of the contract, and DeepSpeed's: the kernels themselves need their GPUs (docs/gpu.md).
"""

from __future__ import annotations

import deepep_jobs
import pytest
import torch
from rank_pool import RankPool
from scenarios import BATCH, Step, reference, settings
from test_engine import assert_same_training

from launch.settings import BadInputError

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]

STEPS = [Step(3), Step(5, grad_loops=3)]
LAYERS, RANKS = 2, 2
MICRO_BATCHES = BATCH // RANKS
PASSES = LAYERS * MICRO_BATCHES


@pytest.mark.parametrize(
    ("routing", "remat", "replayed"),
    [
        ("ordinary", "none", {0}),
        ("ordinary", "loop", {6}),  # each loop with a gradient, once
        ("experts_without_tokens", "dispatch", {0}),  # what arrived was kept
        ("ordinary", "sqrt", {8, 10}),  # of 3 loops the first, and unless torch stops early the second, twice
    ],
)
def test_deepep_trains_as_one_process_and_recomputes_on_the_layout_of_the_first_run(
    two_ranks: RankPool, routing: str, remat: str, replayed: set[int]
) -> None:
    values = settings(routing, parallel={"expert_parallel_size": 2, "comm_backend": "deepep"}, loop={"remat": remat})
    answers = two_ranks.run(
        deepep_jobs.train_by_deepep, timeout_seconds=300, values=values, steps=STEPS, routing=routing
    )
    trace, calls = answers[0]
    assert_same_training(trace, reference(settings(routing), STEPS, routing))
    assert answers[1][1] == calls, "every rank asks for the same"
    assert calls["fresh"] == PASSES * (3 + 5)
    assert calls.get("replayed", 0) in {PASSES * each for each in replayed}
    assert calls["backward of combine"] == calls["backward of dispatch"] == PASSES * (3 + 3)
    assert calls["built"] == calls["destroyed"] == 1, "the layers of a model share one buffer"


def test_what_deepep_cannot_do_is_said_before_ranks_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from pretrain import deepep_transport

    with pytest.raises(BadInputError, match=r"bfloat16 only, and this run is torch\.float32; use precision\.dtype"):
        deepep_transport.check_deepep(torch.float32, "cuda")
    with pytest.raises(BadInputError, match='CUDA only, and this is cpu; use "default"'):
        deepep_transport.check_deepep(torch.bfloat16, "cpu")
    with pytest.raises(BadInputError, match="needs the package deep_ep, version 2 or newer, built from https"):
        deepep_transport.check_deepep(torch.bfloat16, "cuda")
