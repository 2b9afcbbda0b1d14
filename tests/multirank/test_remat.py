"""Rematerialisation under ZeRO-3 on two ranks: the same bits whatever is kept, and no all-to-all that is needless.

One engine serves all policies: steps with a learning rate of 0 leave its weights alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import rank_jobs
import torch
from rank_pool import RankPool
from scenarios import Step, settings
from test_ideas import IDEAS
from torch import Tensor

pytestmark = [pytest.mark.multirank, pytest.mark.timeout(400)]

WAYS: dict[str, tuple[Any, ...]] = {
    "none": ("none", None, False),
    "loop": ("loop", None, False),
    "routes": ("routes", "none", False),
    "dispatch": ("dispatch", None, False),
    "sqrt": ("sqrt", None, False),
    "routes_offloaded": ("routes", None, True),
    "sqrt_offloaded": ("sqrt", None, True),
}
STEP = Step(5, grad_loops=4, shallow=2)


class Exchanges(NamedTuple):
    """All-to-alls of one micro-batch: small ones of counts, large ones of rows."""

    counts_forward: int
    rows_forward: int
    counts_backward: int
    rows_backward: int


class Outcome(NamedTuple):
    """What one policy gave on the first rank."""

    loss: float
    gradients: dict[str, Tensor]
    load: Tensor
    exchanges: Exchanges


@contextmanager
def recorded_exchanges() -> Iterator[list[Tensor]]:
    import deepspeed.comm

    sent: list[Tensor] = []
    original = deepspeed.comm.all_to_all_single

    def recording(output: Tensor, tensor: Tensor, *args: Any, **keys: Any) -> Any:
        sent.append(tensor)
        return original(output, tensor, *args, **keys)

    with mock.patch.object(deepspeed.comm, "all_to_all_single", recording):
        yield sent


def outcome_of(engine: Any) -> Outcome:
    """One micro-batch, then a step that changes nothing."""
    from pretrain.losses import training_objective

    inputs, targets = next(rank_jobs.micro_batches(engine, 0))
    with recorded_exchanges() as sent:
        options = {"targets": targets, "grad_loops": STEP.grad_loops, **STEP.reads(engine.config)}
        output = engine.forward(inputs, STEP.loops, **options)
        loss = training_objective(output, targets, engine.config).total
        forward = len(sent)
        engine.backward(loss)
    gradients = rank_jobs.whole_gradients(engine)
    engine.step(0.0)
    counts = [tensor.dim() == 1 for tensor in sent]
    exchanges = (
        part for calls in (counts[:forward], counts[forward:]) for part in (sum(calls), len(calls) - sum(calls))
    )
    load = engine.take_expert_load()
    assert load is not None
    return Outcome(loss.item(), gradients, load, Exchanges(*exchanges))


def every_policy(values: dict[str, Any], stock: bool) -> dict[str, Outcome]:
    """The job; ``stock``: also with the engine's own layers."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter

    from model.expert_parallel import routed_layers

    engine = rank_jobs.start_engine(values)
    outcomes = {}
    for way, arguments in WAYS.items():
        engine.model.set_remat(*arguments)
        outcomes[way] = outcome_of(engine)
    if stock:
        for layer in routed_layers(engine.model):
            layer.module.__class__, layer.router.__class__ = AutoEPMoELayer, TokenChoiceTopKRouter
        engine.model.set_remat("loop")
        outcomes["stock"] = outcome_of(engine)
    rank_jobs.end_engine(engine)
    return outcomes


def assert_same_bits(outcomes: dict[str, Outcome]) -> None:
    expected = outcomes["none"]
    assert any(gradient.any() for gradient in expected.gradients.values())
    for way in WAYS:
        got = outcomes[way]
        assert got.loss == expected.loss, way
        assert torch.equal(got.load, expected.load), way
        for name, gradient in expected.gradients.items():
            assert torch.equal(got.gradients[name], gradient), f"{way}: {name}"


@pytest.mark.parametrize("expert_parallel_size", [1, 2])
def test_the_same_bits_without_needless_exchanges(two_ranks: RankPool, expert_parallel_size: int) -> None:
    values = settings(parallel={"expert_parallel_size": expert_parallel_size, "micro_batch_size": 4})
    for outcomes in two_ranks.run(every_policy, values=values, stock=True):
        assert_same_bits(outcomes)
        stock, ours = outcomes["stock"], outcomes["loop"]
        assert stock.loss == pytest.approx(ours.loss, rel=1e-6)
        assert torch.equal(stock.load, ours.load)
        for name, gradient in stock.gradients.items():
            torch.testing.assert_close(ours.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        # Calls of an expert layer: 2 layers, 5 loops, 4 of them with gradients. Each sends counts and rows there and
        # back; its backward sends gradients there and back; a recomputation sends what was not kept. sqrt has segments
        # of 2 and 2 loops, and computes the first again up to where its last loop starts.
        forward, graph = 2 * STEP.loops, 2 * 4
        spread = expert_parallel_size > 1
        expected = {
            "none": Exchanges(forward, 2 * forward, 0, 2 * graph),
            "loop": Exchanges(forward, 2 * forward, graph, 4 * graph),
            "routes": Exchanges(forward, 2 * forward, 0, 4 * graph),
            "dispatch": Exchanges(forward, 2 * forward, 0, 2 * graph),
            "sqrt": Exchanges(forward, 2 * forward, graph + 2, 4 * graph + 2 * 2),
        }
        expected |= {
            "routes_offloaded": expected["routes"],
            "sqrt_offloaded": expected["sqrt"],
            "stock": expected["loop"],
        }
        for way, outcome in outcomes.items():
            assert outcome.exchanges == (expected[way] if spread else Exchanges(0, 0, 0, 0)), way


def test_every_idea_at_once_has_the_same_bits(two_ranks: RankPool) -> None:
    sections = copy.deepcopy(IDEAS["all_at_once"])
    sections["loop"].update(min_loops=2)
    sections["parallel"] = {"expert_parallel_size": 2, "micro_batch_size": 2}
    for outcomes in two_ranks.run(every_policy, values=settings(**sections), stock=False):
        assert_same_bits(outcomes)
        backward = {way: outcome.exchanges for way, outcome in outcomes.items()}
        assert backward["dispatch"] == backward["none"]
        assert backward["routes"].counts_backward == 0 < backward["loop"].counts_backward
