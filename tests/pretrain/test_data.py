"""One source and its loader: samples depend on (seed, data, i) only; ranks and micro-batches divide the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.reader import Dataset, open_dataset
from data_pipeline.permutation import KeyedPermutation
from launch.settings import BadInputError
from model.token_loss import IGNORED_TARGET
from pretrain.config import DataSection
from pretrain.data import (
    PADDING_SAMPLE,
    BatchLoader,
    HeldOut,
    TokenSequences,
    check_vocabulary,
    held_out_sets,
    validation_batches,
)

VOCABULARY = 300


def whole_stream(dataset: Dataset, split: str) -> np.ndarray:
    return np.concatenate([np.asarray(shard.tokens, dtype=np.int64) for shard in dataset.split(split).shards])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), length=st.integers(1, 400), epoch=st.integers(0, 1000))
def test_every_epoch_visits_every_block_once(dataset: Dataset, seed: int, length: int, epoch: int) -> None:
    sequences = TokenSequences(dataset, "train", length, seed)
    n = sequences.n_blocks
    assert sorted(sequences.blocks(np.arange(epoch * n, (epoch + 1) * n)).tolist()) == list(range(n))


def test_epochs_seeds_splits_and_fingerprints_give_different_orders(dataset: Dataset) -> None:
    sequences = TokenSequences(dataset, "train", 16, seed=1)
    n = sequences.n_blocks
    other = replace(dataset, manifest=dataset.manifest.model_copy(update={"fingerprint": "f" * 64}))
    orders = [
        sequences.blocks(np.arange(n)),
        sequences.blocks(np.arange(n, 2 * n)),
        TokenSequences(dataset, "train", 16, seed=2).blocks(np.arange(n)),
        TokenSequences(other, "train", 16, seed=1).blocks(np.arange(n)),
    ]
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    fresh = TokenSequences(dataset, "train", 16, seed=1)
    np.testing.assert_array_equal(fresh.blocks(np.arange(n, 2 * n)), orders[1])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=20), st.integers(1, 200))
def test_a_sample_depends_on_its_index_only_and_is_a_slice_of_the_stream(
    dataset: Dataset, ids: list[int], length: int
) -> None:
    sequences = TokenSequences(dataset, "train", length, seed=5)
    stream = whole_stream(dataset, "train")
    together = sequences.tokens(ids)
    for row, index in enumerate(ids):
        sample = TokenSequences(dataset, "train", length, seed=5).sample(index)
        np.testing.assert_array_equal(sample.tokens, together[row])
        np.testing.assert_array_equal(sample.tokens, stream[sample.block * length : (sample.block + 1) * length + 1])


@settings(max_examples=40)
@given(
    world_size=st.integers(1, 6),
    micro_batch_size=st.integers(1, 4),
    batches_per_step=st.integers(1, 3),
    position=st.integers(0, 10**6),
)
def test_ranks_and_micro_batches_only_divide_the_samples_of_a_step(
    dataset: Dataset, world_size: int, micro_batch_size: int, batches_per_step: int, position: int
) -> None:
    sequences = TokenSequences(dataset, "train", 8, seed=0)
    size = world_size * micro_batch_size * batches_per_step
    rows = {}
    for rank in range(world_size):
        loader = BatchLoader(sequences, size, micro_batch_size, rank, world_size)
        batches = loader.step_batches(position)
        assert len(batches) == loader.batches_per_step == batches_per_step
        for batch in batches:
            assert batch.input_ids.shape == batch.targets.shape == (micro_batch_size, 8)
            assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
            for row, index in enumerate(batch.sample_ids):
                assert index not in rows
                rows[index] = (batch.input_ids[row].tolist(), batch.targets[row].tolist())
    assert sorted(rows) == list(range(position, position + size))
    for index, (input_ids, targets) in rows.items():
        tokens = sequences.sample(index).tokens.tolist()
        assert (input_ids, targets) == (tokens[:-1], tokens[1:])


@pytest.mark.parametrize(("size", "micro", "ranks"), [(10, 4, 2), (0, 1, 1), (4, 0, 1), (3, 1, 2)])
def test_a_batch_that_does_not_divide_is_refused(dataset: Dataset, size: int, micro: int, ranks: int) -> None:
    sequences = TokenSequences(dataset, "train", 8, seed=0)
    with pytest.raises(BadInputError, match=f"global batch size {size}: not a positive multiple"):
        BatchLoader(sequences, size, micro, 0, ranks)


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 5), st.integers(1, 4))
def test_validation_makes_every_token_but_the_first_a_target_once_with_its_domain(
    dataset: Dataset, length: int, batch_size: int, world_size: int
) -> None:
    held_out = HeldOut(dataset, length, {})
    stream = whole_stream(dataset, "validation")
    domains = dataset.split("validation").domain_ids(0, stream.size)
    batches = [list(validation_batches(held_out, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in batches}) == 1, "collectives must match"
    seen: Counter[int] = Counter()
    for batch in (batch for of_rank in batches for batch in of_rank):
        assert batch.input_ids.shape == (batch_size, length)
        assert batch.domain_ids is not None
        for row, block in enumerate(batch.sample_ids):
            counts = batch.targets[row] != IGNORED_TARGET
            assert bool(counts.any()) == (block != PADDING_SAMPLE)
            assert batch.domain_ids[row][~counts].eq(-1).all()
            positions = block * length + 1 + counts.nonzero().flatten().numpy()
            seen.update(positions.tolist())
            np.testing.assert_array_equal(batch.targets[row][counts].numpy(), stream[positions])
            np.testing.assert_array_equal(batch.input_ids[row][counts].numpy(), stream[positions - 1])
            np.testing.assert_array_equal(batch.domain_ids[row][counts].numpy(), domains[positions])
    assert seen == Counter(range(1, stream.size))


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(1, 3), st.integers(1, 3))
def test_limited_validation_is_the_same_spread_out_sequences_on_any_ranks(
    dataset: Dataset, limit: int, batch_size: int, world_size: int
) -> None:
    held_out = HeldOut(dataset, 10, {})
    of_ranks = [list(validation_batches(held_out, batch_size, rank, world_size, limit)) for rank in range(world_size)]
    assert len({len(batches) for batches in of_ranks}) == 1
    ids = sorted(i for batches in of_ranks for batch in batches for i in batch.sample_ids if i != PADDING_SAMPLE)
    n_blocks = -(-(held_out.stream.total_tokens - 1) // 10)
    assert len(ids) == len(set(ids)) == min(limit, n_blocks)
    assert max(np.diff([-1, *ids, n_blocks])) <= -(-n_blocks // len(ids)) + 1


def test_each_data_set_of_a_mixture_is_held_out_once_and_knows_its_sources(
    dataset: Dataset, dataset_maker: Callable[..., Dataset], tmp_path: Path
) -> None:
    other = dataset_maker(tmp_path / "other", seed=4)
    sources = [
        {"path": str(dataset.folder), "name": "easy", "domains": ["a", "b"]},
        {"path": str(other.folder), "name": "new"},
        {"path": str(dataset.folder), "name": "hard", "domains": ["c"]},
    ]
    section = DataSection.model_validate({"sources": sources, "sequence_length": 16})
    main, second = held_out_sets(section, dataset, [other])
    assert main.dataset is dataset
    assert main.sources == {"easy": ("a", "b"), "hard": ("c",)}
    assert second.dataset is other
    assert second.sources == {"new": None}
    (alone,) = held_out_sets(DataSection(path=str(dataset.folder)), dataset)
    assert list(alone.sources.values()) == [None]


def test_the_order_is_frozen_for_one_data_set(dataset: Dataset) -> None:
    # Today's run of `data.path` alone goes on tomorrow: the key's text and the order may never change.
    sequences = TokenSequences(dataset, "train", 16, seed=1)
    assert sequences.key == f"{dataset.fingerprint}/train/16"
    expected = KeyedPermutation(sequences.n_blocks, f"1/{dataset.fingerprint}/train/16/2".encode())
    start = 2 * sequences.n_blocks
    np.testing.assert_array_equal(sequences.blocks(range(start, start + 50)), expected(np.arange(50)))


def test_a_split_shorter_than_a_sequence_is_one_line(dataset: Dataset) -> None:
    with pytest.raises(BadInputError, match="fewer than one sequence of 100000"):
        TokenSequences(dataset, "validation", 100_000, seed=0)


def test_a_model_with_too_few_embeddings_is_refused(dataset: Dataset) -> None:
    check_vocabulary(dataset, VOCABULARY)
    check_vocabulary(dataset, VOCABULARY + 84)
    with pytest.raises(BadInputError, match=r"model\.vocab_size = 299: smaller than the 300 tokens"):
        check_vocabulary(dataset, 299)


def test_a_copy_of_a_data_set_gives_the_same_samples(dataset: Dataset, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(dataset.folder, tmp_path / "elsewhere")
    copy = open_dataset(tmp_path / "elsewhere")
    one, two = (TokenSequences(each, "train", 32, seed=9) for each in (dataset, copy))
    np.testing.assert_array_equal(one.tokens(range(500)), two.tokens(range(500)))
