"""Batches and the threads that read them ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.reader import Dataset
from launch.settings import BadInputError
from model.token_loss import IGNORED_TARGET
from pretrain.data import (
    Batch,
    BatchLoader,
    HeldOut,
    Prefetcher,
    SlowDataError,
    TokenSequences,
    validation_batches,
)
from pretrain.data.loader import batch_of
from pretrain.data.packing import Row


class Slow:
    """Rows that take a while, remember who read them, and fail at one sample."""

    def __init__(self, seconds: float = 0.0, bad: int | None = None) -> None:
        self.seconds, self.bad = seconds, bad
        self.read: list[int] = []
        self.threads: set[str] = set()

    def rows(self, sample_ids: Sequence[int], with_documents: bool = False) -> list[Row]:
        time.sleep(self.seconds)
        self.read += sample_ids
        self.threads.add(threading.current_thread().name)
        if self.bad in sample_ids:
            raise BadInputError("shard_00001.bin: a token id is damaged")
        return [Row(np.arange(i, i + 5)) for i in sample_ids]


def workers_alive() -> int:
    return sum(thread.name.startswith("data_") for thread in threading.enumerate())


@settings(max_examples=25)
@given(workers=st.integers(0, 4), steps=st.integers(1, 5), length=st.integers(1, 12), data=st.data())
def test_batches_are_the_same_for_any_number_of_workers(
    dataset: Dataset, workers: int, steps: int, length: int, data: st.DataObject
) -> None:
    loader = BatchLoader(TokenSequences(dataset, "train", 8, seed=1), 6, 3)
    end = 6 * length
    positions = data.draw(st.one_of(st.just(list(range(0, end, 6))), st.lists(st.integers(0, end), max_size=8)))
    with Prefetcher(loader, end, workers, steps) as batches:
        for position in positions:
            for got, wanted in zip(batches.step_batches(position), loader.step_batches(position), strict=True):
                assert got.sample_ids == wanted.sample_ids
                assert torch.equal(got.input_ids, wanted.input_ids)
                assert torch.equal(got.targets, wanted.targets)
    assert workers_alive() == 0


def test_steps_are_read_ahead_and_none_past_the_end() -> None:
    source = Slow()
    with Prefetcher(BatchLoader(source, 2, 2), end=8, workers=2, steps=2) as batches:
        batches.step_batches(0)
        deadline = time.monotonic() + 20
        while len(source.read) < 6 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(source.read) == list(range(6)), "the step asked for and two more"
        for position in (2, 4, 6):
            batches.step_batches(position)
    assert sorted(source.read) == list(range(8))
    assert all(name.startswith("data_") for name in source.threads)


def test_a_step_that_was_read_ahead_is_not_waited_for() -> None:
    with Prefetcher(BatchLoader(Slow(0.05), 2, 2), end=100, workers=1, steps=1) as batches:
        batches.step_batches(0)
        assert batches.waited_seconds > 0.04
        time.sleep(0.3)  # the model computes
        batches.step_batches(2)
        assert batches.waited_seconds < 0.04


def test_without_workers_the_caller_reads_and_waits() -> None:
    source = Slow(0.02)
    with Prefetcher(BatchLoader(source, 2, 2), end=100, workers=0, steps=3) as batches:
        batches.step_batches(0)
        assert batches.waited_seconds >= 0.02
    assert source.read == [0, 1]
    assert source.threads == {threading.current_thread().name}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_in_a_worker_is_the_trainers_at_that_step(workers: int) -> None:
    with Prefetcher(BatchLoader(Slow(bad=5), 2, 1), end=100, workers=workers, steps=3) as batches:
        batches.step_batches(0)
        batches.step_batches(2)
        with pytest.raises(BadInputError, match=r"shard_00001\.bin: a token id is damaged"):
            batches.step_batches(4)
    assert workers_alive() == 0


def test_closing_ends_the_threads_though_steps_are_waiting() -> None:
    started = time.monotonic()
    batches = Prefetcher(BatchLoader(Slow(0.05), 2, 2), end=10**6, workers=1, steps=100)
    batches.step_batches(0)
    batches.close()
    assert workers_alive() == 0
    assert time.monotonic() - started < 2


def test_positions_begin_again_with_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 2, 2, 2, 2]])
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    batch = Batch(tokens, tokens, (0, 1), document_ids=documents)
    assert batch.position_ids().tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
    assert Batch(tokens, tokens, (0, 1)).position_ids().tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_targets_that_do_not_count_are_ignored() -> None:
    row = Row(np.arange(10, 15), np.array([0, 0, 1, 1]), np.array([True, False, True, False]))
    batch = batch_of([7], [row])
    assert batch.input_ids.tolist() == [[10, 11, 12, 13]]
    assert batch.targets.tolist() == [[11, IGNORED_TARGET, 13, IGNORED_TARGET]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 1, 1]]


def test_validation_with_documents_has_the_same_targets(dataset: Dataset) -> None:
    held_out = HeldOut(dataset, 20, {})
    plain = list(validation_batches(held_out, 4))
    masked = list(validation_batches(held_out, 4, with_documents=True))
    ends = np.cumsum(
        [n for shard in dataset.split("validation").shards for n in np.diff(shard.document_ends, prepend=np.uint64(0))]
    )
    for one, two in zip(plain, masked, strict=True):
        assert torch.equal(one.targets, two.targets)
        assert one.document_ids is None
        assert two.document_ids is not None
        for row, block in enumerate(two.sample_ids):
            counted = two.targets[row] != IGNORED_TARGET
            owner = np.searchsorted(ends, block * 20 + 1 + np.arange(int(counted.sum())), side="right")
            if owner.size:
                assert two.document_ids[row][counted].tolist() == (owner - owner[0]).tolist()
                assert (two.document_ids[row][~counted] == two.document_ids[row][counted][-1] + 1).all()


def test_a_model_under_the_mask_predicts_each_document_as_if_it_were_alone(dataset: Dataset) -> None:
    """The pass-through end to end: packed rows and lone documents give the same losses, token by token."""
    from model import IceConfig, IceModel
    from model.token_loss import token_losses
    from pretrain.data.packing import BestFit
    from pretrain.data.selection import DocumentStream

    torch.manual_seed(0)
    model = IceModel(IceConfig().scaled_down()).eval()
    packed = BestFit(DocumentStream(dataset.split("train")), 48, 1)
    rows = [packed.read(row, 0, 48, True) for row in range(packed.n_rows)]
    row = next(r for r in rows if r.document_ids is not None and r.document_ids.max() >= 3)
    vocabulary = model.config.vocab_size
    batch = batch_of([0], [Row(row.tokens % vocabulary, row.document_ids, row.counted)])
    with torch.no_grad():
        together = token_losses(model(batch.input_ids, n_loops=2, document_ids=batch.document_ids), batch.targets)
        assert batch.document_ids is not None
        for number in range(int(batch.document_ids.max())):
            mine = batch.document_ids[0] == number
            alone = token_losses(model(batch.input_ids[:, mine], n_loops=2), batch.targets[:, mine])
            torch.testing.assert_close(together[:, mine], alone, rtol=1e-4, atol=1e-4)


def test_the_trainer_hands_document_ids_to_the_engine_only_when_there_are_any(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pretrain.trainer

    seen: list[dict[str, Any]] = []
    term = torch.zeros((), requires_grad=True)

    class Engine:
        device, place = torch.device("cpu"), SimpleNamespace(world_size=1, rank=0)

        def forward(self, input_ids: torch.Tensor, loops: int, **options: Any) -> None:
            seen.append(options)

        def backward(self, loss: torch.Tensor) -> None: ...

        def step(self, lr: float) -> Any:
            return SimpleNamespace(skipped=False, scale_lowered=False, grad_norm=1.0)

        def take_expert_load(self) -> None: ...

        def sum_over_ranks(self, values: list[float]) -> list[float]:
            return values

    objective = SimpleNamespace(total=term, terms={"loss": term.detach()})
    monkeypatch.setattr(pretrain.trainer, "training_objective", lambda *_: objective)
    config: Any = SimpleNamespace(
        loop=SimpleNamespace(grad_loops=None, cdl=None),
        model=SimpleNamespace(slu=False, core="ice", initial_state="zeros"),
        run=SimpleNamespace(seed=0),
    )
    sequences = TokenSequences(dataset, "train", 8, seed=0)
    for mask in (False, True):
        batches: Any = Prefetcher(BatchLoader(sequences, 4, 2, with_documents=mask), 100, 0, 1)
        parts: Any = (None, batches, *[None] * 8)
        engine: Any = Engine()
        trainer = pretrain.trainer.Trainer(config, engine, *parts)
        plan: Any = SimpleNamespace(step=1, loops=2, lr=0.1)
        result = trainer._step(plan, batches.step_batches(0))
        assert result.data_wait_seconds == batches.waited_seconds > 0
    assert ["document_ids" in options for options in seen] == [False, False, True, True]


def test_a_caller_that_gives_up_gets_nothing_and_a_slow_read_is_an_error_with_its_samples(dataset: Dataset) -> None:
    released = threading.Event()

    class HangingLoader(BatchLoader):
        def step_batches(self, next_sample: int) -> list[Batch]:
            if next_sample >= 4:
                released.wait(60)
            return super().step_batches(next_sample)

    loader = HangingLoader(TokenSequences(dataset, "train", 8, seed=0), 4, 2)
    try:
        with Prefetcher(loader, 100, workers=1, steps=1, timeout_seconds=0.5) as batches:
            assert batches.step_batches(0, give_up=lambda: True) is not None or batches.stuck
            batches.stuck = False
            assert batches.step_batches(4, give_up=lambda: True) is None
            assert batches.stuck
            with pytest.raises(SlowDataError, match=r"samples 8 to 11 were not read in 0\.5 s"):
                batches.step_batches(8)
            # Leaving the block does not wait for the thread.
    finally:
        released.set()
