"""HTML becomes text by either library; what cannot be extracted is a drop with a name."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.clean import extraction
from data_pipeline.clean.extraction import EXTRACTORS, extract_text
from data_pipeline.clean.settings import ExtractionSettings

STORY = "The river had risen in the night, and by morning the harbour was full of driftwood and of voices. " * 4
PAGE = (
    "<html><head><title>News</title><style>p {color: red}</style></head><body><nav><a href='/'>Home</a> <a "
    f"href='/x'>Imprint</a></nav><main><article><h1>Flood</h1><p>{STORY}</p><p>{STORY[::-1]}</p></article></main>"
    "<footer>Copyright notice</footer><script>var x = 1;</script></body></html>"
)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_the_story_is_kept_and_the_page_around_it_goes(extractor: str) -> None:
    text, reason = extract_text(PAGE, ExtractionSettings.model_validate({"extractor": extractor}))
    assert reason is None
    assert STORY.strip() in text
    assert not any(word in text for word in ("Imprint", "Copyright", "var x", "color: red", "<p>"))


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_the_whole_page_is_kept_when_asked(extractor: str) -> None:
    values = {"extractor": extractor, "main_content": False}
    text, reason = extract_text(PAGE, ExtractionSettings.model_validate(values))
    assert reason is None
    assert "Imprint" in text
    assert "var x" not in text


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_what_was_seen_before_changes_nothing(extractor: str) -> None:
    settings = ExtractionSettings.model_validate({"extractor": extractor})
    assert len({extract_text(PAGE, settings) for _ in range(5)}) == 1


@pytest.mark.parametrize("html", ["", "   ", "<html><body><script>1</script></body></html>"])
def test_a_page_without_text_is_named(html: str) -> None:
    assert extract_text(html, ExtractionSettings()) == (html, "extraction_empty")


def test_a_page_too_large_is_named() -> None:
    assert extract_text("x" * 11, ExtractionSettings(max_html_characters=10))[1] == "html_too_large"


def test_a_parser_that_gives_up_is_a_named_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(html: str, main_content: bool) -> str:
        raise RecursionError

    monkeypatch.setitem(extraction.EXTRACTORS, "resiliparse", fail)
    assert extract_text(PAGE, ExtractionSettings()) == (PAGE, "extraction_failed")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<p>", "</p>", "<div", ">", "<!--", "a & b", "\x00", "&#x;", "<table><tr>", "\U0001f600"])
    )
)
def test_any_html_gives_text_or_a_reason(parts: list[str]) -> None:
    html = "".join(parts)
    text, reason = extract_text(html, ExtractionSettings())
    assert text.strip() if reason is None else text == html


def test_bottomless_nesting_is_named_and_ends() -> None:
    start = time.process_time()
    html = "<div>" * 100_000 + "deep" + "</div>" * 100_000
    assert extract_text(html, ExtractionSettings()) == (html, "html_too_deep")
    assert time.process_time() - start < 2


def test_many_elements_that_are_never_closed_are_not_deep() -> None:
    html = "<body><ul>" + "".join(f"<li>Entry {number} of the list<br>" for number in range(2000)) + "</ul></body>"
    text, reason = extract_text(html, ExtractionSettings(main_content=False))
    assert reason is None
    assert "Entry 1999" in text
