"""The split depends on a document's text and the seed, on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import SplitSettings
from data_pipeline.split import split_of, text_fraction


@given(st.text(), st.integers(0, 2**62))
def test_fractions_lie_in_the_unit_interval_and_purposes_are_independent(text: str, seed: int) -> None:
    first = text_fraction(text, b"split", seed)
    assert 0.0 <= first < 1.0
    assert first == text_fraction(text, b"split", seed)
    assert first != text_fraction(text, b"tokenizer", seed)
    assert first != text_fraction(text, b"split", seed + 1)


def test_the_held_out_part_has_about_its_size_and_grows_with_the_fraction() -> None:
    texts = [f"document {number}" for number in range(5000)]
    held_out = {
        fraction: {text for text in texts if split_of(text, SplitSettings(validation_fraction=fraction)) != "train"}
        for fraction in (0.02, 0.1)
    }
    assert 60 < len(held_out[0.02]) < 140
    assert 420 < len(held_out[0.1]) < 580
    assert held_out[0.02] < held_out[0.1]
