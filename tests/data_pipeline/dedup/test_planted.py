"""Planted pairs are found as often as the theory says, and nothing else is removed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_pipeline.config import DedupSettings
from data_pipeline.dedup.planted import binomial_tail, jaccard, planted_pair, probability_found, run_planted_study
from data_pipeline.execution.executors import LocalExecutor

# A right program fails a row of the study with this probability.
TOO_UNLIKELY = 1e-4


@pytest.mark.parametrize(
    "settings", [DedupSettings(), DedupSettings(ngram=3, buckets=20, hashes_per_bucket=4, seed=9)], ids=["14x8", "20x4"]
)
def test_planted_duplicates_are_found_as_the_theory_says(tmp_path: Path, settings: DedupSettings) -> None:
    study = run_planted_study(
        LocalExecutor(1), tmp_path / "study", settings, similarities=(0.3, 0.5, 0.65, 0.75, 0.85, 0.95), pairs=60
    )
    for row in study.rows:
        assert row.tail_probability > TOO_UNLIKELY, row
    assert study.exact_found == study.exact_pairs
    assert study.unrelated_removed == 0
    assert study.not_the_first_kept == 0


def test_planted_pairs_have_the_similarity_they_are_said_to_have() -> None:
    generator = random.Random(0)
    for similarity in (0.0, 0.2, 0.5, 0.8, 0.95, 1.0):
        first, second = planted_pair(generator, similarity, 5)
        assert jaccard(first, second, 5) == pytest.approx(similarity, abs=0.005)
        assert len(first.split()) == len(second.split()) == 200
    assert jaccard("a b c d", "b c d e", 2) == 2 / 4


def test_the_binomial_tail_is_a_sum_of_binomial_probabilities() -> None:
    assert binomial_tail(3, 0.5, 1) == pytest.approx(0.5)
    assert binomial_tail(200, 0.1, 10) == pytest.approx(0.0081, abs=1e-4)
    assert binomial_tail(10, 0.0, 0) == 1.0
    assert binomial_tail(10, 1.0, 9) == 0.0
    assert probability_found(0.8, DedupSettings()) == pytest.approx(0.924, abs=5e-4)
