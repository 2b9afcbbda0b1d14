"""A run's samples out of several sources: settings, stages, what a resume may change, what is refused by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dataset.reader import Dataset
from launch.settings import BadInputError, parse_settings
from pretrain.config import DataSection, TrainingConfig
from pretrain.data import BatchLoader, Sampler, TokenSequences, open_sampler, past_of
from pretrain.main import main


@pytest.fixture(scope="module")
def other(dataset_maker: Callable[..., Dataset], tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset_maker(tmp_path_factory.mktemp("other"), seed=8, longest=40)


def section_of(**values: Any) -> DataSection:
    return parse_settings(DataSection, {"sequence_length": 16, "global_batch_size": 4, **values}, "test")


def sampler_of(main_dataset: Dataset, seed: int = 5, **values: Any) -> Sampler:
    return open_sampler(section_of(**values), seed, 300, main_dataset)


def sources(dataset: Dataset, other: Dataset, **first: Any) -> list[dict[str, Any]]:
    return [
        {"path": str(dataset.folder), "name": "one", "weight": 0.75, **first},
        {"path": str(other.folder), "name": "two", "weight": 0.25},
    ]


def test_a_path_alone_gives_the_samples_of_that_source(dataset: Dataset) -> None:
    sampler = sampler_of(dataset, path=str(dataset.folder))
    alone = TokenSequences(dataset, "train", 16, seed=5)
    ids = [*range(30), alone.n_blocks + 3, 10**9]
    np.testing.assert_array_equal([row.tokens for row in sampler.rows(ids)], alone.tokens(ids))
    listed = sampler_of(dataset, sources=[{"path": str(dataset.folder), "weight": 7}])
    np.testing.assert_array_equal([row.tokens for row in listed.rows(ids)], alone.tokens(ids))
    assert past_of(listed.identity(), 100) == past_of(sampler.identity(), 100)


@settings(max_examples=30)
@given(world_size=st.integers(1, 4), micro=st.sampled_from([1, 2, 4]), step=st.integers(0, 300), best_fit=st.booleans())
def test_a_mixture_is_the_same_for_any_ranks_and_micro_batches(
    dataset: Dataset, other: Dataset, world_size: int, micro: int, step: int, best_fit: bool
) -> None:
    sampler = sampler_of(
        dataset, sources=sources(dataset, other), packing="best_fit" if best_fit else "concatenate", document_mask=True
    )
    size = 4 * 4 * 3
    whole = BatchLoader(sampler, size, size, with_documents=True).step_batches(step * size)[0]
    rows: dict[int, list[list[int]]] = {}
    if size % (micro * world_size):
        return
    for rank in range(world_size):
        for batch in BatchLoader(sampler, size, micro, rank, world_size, True).step_batches(step * size):
            assert batch.document_ids is not None
            for row, i in enumerate(batch.sample_ids):
                rows[i] = [batch.input_ids[row].tolist(), batch.targets[row].tolist(), batch.document_ids[row].tolist()]
    assert sorted(rows) == list(range(step * size, (step + 1) * size))
    assert whole.document_ids is not None
    for row, i in enumerate(whole.sample_ids):
        expected = [whole.input_ids[row].tolist(), whole.targets[row].tolist(), whole.document_ids[row].tolist()]
        assert rows[i] == expected


def test_sources_come_in_proportion_each_in_its_own_order(dataset: Dataset, other: Dataset) -> None:
    sampler = sampler_of(dataset, sources=sources(dataset, other))
    located = sampler.plan.locate(np.arange(400))
    assert np.bincount(located.source).tolist() == [300, 100]
    rows = sampler.rows(range(400))
    for number, data in enumerate((dataset, other)):
        mine = [row.tokens for row, source in zip(rows, located.source.tolist(), strict=True) if source == number]
        np.testing.assert_array_equal(mine, TokenSequences(data, "train", 16, seed=5).tokens(range(len(mine))))


def test_shorter_sequences_are_parts_of_the_long_ones_and_an_epoch_has_each_once(dataset: Dataset) -> None:
    stages = [{"from_tokens": 0, "sequence_length": 4}]
    sampler = sampler_of(dataset, path=str(dataset.folder), stages=stages)
    n = sampler.sources[0].n_blocks
    got = Counter(tuple(row.tokens.tolist()) for row in sampler.rows(range(4 * n)))
    stream = dataset.split("train")
    assert got == Counter(tuple(stream.read(start, 5).tolist()) for start in range(0, 16 * n, 4))
    ids = sampler.rows(range(20), with_documents=True)
    for row in ids:
        assert row.document_ids is not None
        assert row.document_ids.shape == (4,)
        assert row.document_ids[0] == 0


def test_filters_split_a_data_set_and_a_curriculum_goes_from_one_part_to_the_other(dataset: Dataset) -> None:
    parts = [
        {"path": str(dataset.folder), "name": "easy", "difficulty": [0, 0.5]},
        {"path": str(dataset.folder), "name": "hard", "difficulty": [0.5, 1], "weight": 0},
    ]
    stages = [{"from_tokens": 640, "weights": {"easy": 1, "hard": 3}, "mean_loops": 6}]
    sampler = sampler_of(dataset, sources=parts, stages=stages)
    located = sampler.plan.locate(np.arange(80))
    assert np.bincount(located.source[:40]).tolist() == [40]
    assert np.bincount(located.source[40:]).tolist() == [10, 30]
    assert [sampler.stage_at(i).mean_loops for i in (0, 39, 40)] == [None, None, 6]
    easy, hard = (source.documents.total_tokens for source in sampler.sources)
    assert easy + hard == dataset.split("train").total_tokens


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([{"domains": ["a"]}, {"domains": ["b", "a"]}], "two and one: share"),
        ([{}, {"domains": ["b"]}], "two and one: share"),
        ([{"max_document_tokens": 30}, {"min_document_tokens": 20}], "two and one: share"),
        ([{"max_document_tokens": 20}, {"min_document_tokens": 21}], None),
        ([{"domains": ["a"]}, {"domains": ["b", "c"]}], None),
        ([{"domains": ["a"]}, {"domains": ["d"]}], "domain 'd' is not one of"),
        ([{"domains": ["a"]}, {"min_document_tokens": 10**6}], "the chosen documents have 0 tokens"),
    ],
)
def test_no_document_is_in_two_sources(dataset: Dataset, changes: list[dict[str, Any]], told: str | None) -> None:
    names = ("one", "two")
    given = [{"path": str(dataset.folder), "name": n, **c} for n, c in zip(names, changes, strict=True)]
    if told is None:
        sampler_of(dataset, sources=given)
        return
    with pytest.raises(BadInputError, match=told):
        sampler_of(dataset, sources=given)


def test_a_source_with_another_tokenizer_is_refused(
    dataset: Dataset, dataset_maker: Callable[..., Dataset], tmp_path: Path
) -> None:
    foreign = dataset_maker(tmp_path, text="quite another vocabulary")
    with pytest.raises(BadInputError, match="was prepared with another tokenizer than"):
        sampler_of(dataset, sources=sources(dataset, foreign))


def test_a_run_that_uses_a_source_up_is_told_or_refused(dataset: Dataset, other: Dataset) -> None:
    capped = sources(dataset, other, max_epochs=2)
    sampler = sampler_of(dataset, sources=capped)
    sampler.require_enough(10**6)
    n = sampler.sources[0].n_blocks
    end = sampler.plan.used_up(10**6)[0][1]
    assert abs(end - 2 * n / 0.75) < 2
    strict = sampler_of(dataset, sources=capped, when_used_up="refuse")
    strict.require_enough(end)
    with pytest.raises(BadInputError, match=r'max_epochs = 2 of one: used up after .* data\.when_used_up = "refuse"'):
        strict.require_enough(end + 1)
    both = [{**source, "max_epochs": 1} for source in capped]
    with pytest.raises(BadInputError, match="nothing is left then"):
        sampler_of(dataset, sources=both).require_enough(10**6)


# What may change on resume: `before` ran 100 samples (1,600 tokens).
BEFORE: dict[str, Any] = {"stages": [{"from_tokens": 800, "weights": {"one": 1, "two": 1}}]}


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (BEFORE, []),
        ({"stages": [*BEFORE["stages"], {"from_tokens": 1600, "sequence_length": 8, "mean_loops": 3}]}, []),
        ({"stages": [*BEFORE["stages"], {"from_tokens": 1500}]}, ["from_sample_96.weights.one"]),
        ({"stages": [{"from_tokens": 800, "weights": {"one": 1, "two": 2}}]}, ["from_sample_52.weights.two"]),
        ({"stages": [{"from_tokens": 400, "weights": {"one": 1, "two": 1}}]}, ["from_sample_28.weights.one"]),
        ({"stages": [{**BEFORE["stages"][0], "mean_loops": 9}]}, ["from_sample_52.mean_loops"]),
        ({"packing": "best_fit"}, ["packing"]),
        ({"document_mask": True}, ["document_mask"]),
        ({"sequence_length": 32}, ["sequence_length"]),
        ({"prefetch_workers": 5}, []),
    ],
)
def test_a_changed_past_has_a_name_and_a_changed_future_has_none(
    dataset: Dataset, other: Dataset, after: dict[str, Any], told: list[str]
) -> None:
    common = {"sources": sources(dataset, other)}
    before = past_of(sampler_of(dataset, **common, **BEFORE).identity(), 100)
    now = past_of(sampler_of(dataset, **common, **{**BEFORE, **after}).identity(), 100)
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    assert changed >= set(told)
    assert bool(changed) == bool(told)


def test_a_new_source_from_now_on_and_a_later_cap_are_a_future(dataset: Dataset, other: Dataset) -> None:
    before = sampler_of(dataset, path=str(dataset.folder))
    stages = [{"from_tokens": 1600, "weights": {"one": 1, "two": 1}}]
    later = [{"path": str(dataset.folder), "name": "one"}, {"path": str(other.folder), "name": "two", "weight": 0}]
    after = sampler_of(dataset, sources=later, stages=stages)
    assert past_of(before.identity(), 100) == past_of(after.identity(), 100)
    assert past_of(before.identity(), 104) != past_of(after.identity(), 104)
    np.testing.assert_array_equal(
        [row.tokens for row in before.rows(range(100))], [row.tokens for row in after.rows(range(100))]
    )
    both = sources(dataset, other)
    capped = sources(dataset, other, max_epochs=3)
    one, two = (sampler_of(dataset, sources=each) for each in (both, capped))
    end = two.plan.used_up(10**6)[0][1]
    assert past_of(one.identity(), end) == past_of(two.identity(), end)
    assert past_of(one.identity(), end + 1) != past_of(two.identity(), end + 1)


def test_an_identity_survives_json_and_older_checkpoints_are_understood(dataset: Dataset) -> None:
    identity = sampler_of(dataset, path=str(dataset.folder)).identity()
    assert past_of(json.loads(json.dumps(identity)), 8) == past_of(identity, 8)
    old = {"fingerprint": dataset.fingerprint, "sequence_length": 16, "global_batch_size": 4, "seed": 5}
    assert past_of(old, 8) == past_of(identity, 8)
    assert past_of({**old, "fingerprint": "other"}, 8)["fingerprint"] == "other"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "path: is required and missing"),
        ({"sources": [{"path": "x"}, {"path": "y/x"}]}, 'sources.1.name = "x": is the name of two sources'),
        ({"sources": [{"path": "x", "weight": 0}]}, "no source has a weight"),
        ({"sources": [{"path": "x", "weight": -1}]}, "sources.0.weight = -1"),
        ({"sources": [{"path": "x", "max_epochs": 0}]}, "sources.0.max_epochs = 0"),
        ({"sources": [{"path": "x", "difficulty": [0.5, 0.2]}]}, "must be two rising quantiles"),
        ({"sources": [{"path": "x", "difficulty_file": "y.npy"}]}, "needs difficulty = [low, high]"),
        ({"sources": [{"path": "x", "min_document_tokens": 9, "max_document_tokens": 8}]}, "exceeds max_document"),
        ({"path": "x", "stages": [{"from_tokens": 9}, {"from_tokens": 9}]}, "stages.1.from_tokens = 9: must be above"),
        ({"path": "x", "stages": [{"from_tokens": 9, "weights": {"y": 1}}]}, 'stages.0.weights = "y": is not a source'),
        ({"path": "x", "stages": [{"from_tokens": 9, "weights": {"x": 0}}]}, "no source has a weight"),
        ({"path": "x", "stages": [{"from_tokens": 9, "weights": {"x": -1}}]}, "must not be negative"),
        ({"path": "x", "stages": [{"from_tokens": 9, "sequence_length": 5}]}, "must divide data.sequence_length = 16"),
        (
            {"path": "x", "packing": "best_fit", "stages": [{"from_tokens": 9, "sequence_length": 8}]},
            "packs for one length only",
        ),
        ({"path": "x", "pack": 1}, "pack = 1: unknown key; did you mean packing?"),
    ],
)
def test_a_mistake_in_the_mixture_is_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInputError) as error:
        section_of(**values)
    assert told in str(error.value)


TINY: dict[str, Any] = {
    "model": {"variant": "ice_tiny"},
    "loop": {"distribution": "poisson", "mean_loops": 4, "max_loops": 8},
    "schedule": {"steps": 200, "warmup_steps": 4},
    "logging": {"wandb": "disabled"},
}


@pytest.mark.parametrize(("mean_loops", "fits"), [(1, True), (8, True), (9, False)])
def test_a_stage_is_as_deep_as_loop_allows(mean_loops: int, fits: bool) -> None:
    data = {"path": "x", "sequence_length": 16, "stages": [{"from_tokens": 64, "mean_loops": mean_loops}]}
    if fits:
        parse_settings(TrainingConfig, {**TINY, "data": data}, "x.json")
        return
    with pytest.raises(BadInputError, match=r"data\.stages\.0\.mean_loops = 9: must be at least 1 and at most"):
        parse_settings(TrainingConfig, {**TINY, "data": data}, "x.json")


def test_the_dry_run_says_what_the_run_will_see_of_each_source(
    dataset: Dataset, other: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        "sequence_length": 16,
        "global_batch_size": 4,
        "sources": sources(dataset, other, max_epochs=2),
        "stages": [{"from_tokens": 1600, "weights": {"one": 1, "two": 1}, "sequence_length": 8, "mean_loops": 6}],
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**TINY, "data": data}))
    assert main(["--config", str(path), "--dry-run", "--ranks", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]] for line in lines if "│" in line}
    sampler = open_sampler(section_of(**data), 0, 4096, dataset)
    seen = sampler.plan.epochs_before(800)
    assert cells["one"][:3] == ["0.75", f"{dataset.split('train').total_tokens:,}", f"{seen[0]:.2f} of 2"]
    assert cells["two"][2] == f"{seen[1]:.2f}"
    assert cells["1,600"] == ["25", "8", "6", "50.0%", "50.0%"]
    # 25 steps of 4 x 16 tokens, 175 of 4 x 8.
    assert any(line.split() == ["tokens", "in", "all", "7,200"] for line in lines)


def test_the_dry_run_refuses_what_training_would(dataset: Dataset, tmp_path: Path) -> None:
    data = {"sequence_length": 16, "sources": [{"path": str(dataset.folder), "max_epochs": 1}]}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**TINY, "data": data}))
    with pytest.raises(BadInputError, match="max_epochs = 1 of out: used up after"):
        main(["--config", str(path), "--dry-run", "--ranks", "1"])
