"""The report accounts for every document, holds nothing of other people's that a browser would run, and is one file."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data_pipeline.clean.samples import Sample
from data_pipeline.execution.tally import tally_sum
from data_pipeline.report.content import Loss, ReportContent
from data_pipeline.report.page import render_page
from data_pipeline.report.pictures import COLOURS, OTHER, domain_colours, grouped

EVIL = "<script>alert('x')</script> & \"quoted\" <img src=http://x/y>"


def tally(**documents: int) -> dict[str, dict[str, int]]:
    return {domain: {"documents": count, "bytes": 100 * count} for domain, count in documents.items()}


def make_content(n_domains: int = 3) -> ReportContent:
    domains = {f"domain{index}": 50 - index for index in range(n_domains)}
    counted = {kind: {"documents": 40, "bytes": 4_000} for kind in ("read", "train", "validation")}
    return ReportContent(
        name="made <b>",
        read=tally(**domains),
        losses=[Loss("length", {"too_short": tally(domain0=3), "empty": tally(domain1=2)})],
        train=tally(**{domain: count - 6 for domain, count in domains.items()}),
        validation=tally(domain0=1),
        tokens={"train": {"domain0": 12_345}, "validation": {"domain0": 67}},
        lengths={"domain0": {40: 3, 44: 1}, "domain1": {41: 7}},
        languages={"en": 90, "de": 2, **{f"l{index}": 1 for index in range(20)}},
        samples={"kept": [Sample(1, EVIL, "domain0", 10_000, EVIL)], "too_short": [Sample(2, "id", "domain0", 1, "x")]},
        sources={"crawl <i>": {**counted, "quarantined": {}, "dropped": {"too_short": {"documents": 3, "bytes": 300}}}},
    )


class Tags(HTMLParser):
    """Counts tags and collects sources and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.shown: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def read_page(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    return tags


def test_text_of_documents_is_shown_and_never_run() -> None:
    tags = read_page(render_page(make_content()))
    assert "script" not in tags.tags
    assert not {"b", "i"} & set(tags.tags)
    assert tags.tags.count("img") == 5
    assert EVIL in "".join(tags.shown)
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)


def test_pictures_are_pngs_and_the_same_each_time() -> None:
    page = render_page(make_content())
    assert page == render_page(make_content())
    for source in read_page(page).sources:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")


@pytest.mark.parametrize("n_domains", [1, 30])
def test_any_number_of_domains_can_be_drawn(n_domains: int) -> None:
    content = make_content(max(n_domains, 2))
    assert render_page(content)
    colours = domain_colours(content.domains)
    assert len(colours) <= len(COLOURS) + 1
    assert (OTHER in colours) == (n_domains > len(COLOURS))
    sums = grouped(content.read, colours, lambda counts: counts["documents"])
    assert sum(sums.values()) == tally_sum(content.read)["documents"]


def test_a_preparation_that_dropped_nothing_and_identified_no_language_has_a_page() -> None:
    content = make_content()
    plain = ReportContent(**{**vars(content), "losses": [], "languages": {}, "samples": {}, "lengths": {}})
    assert "No source had its language identified" in render_page(plain)


def test_the_page_of_a_real_preparation_agrees_with_its_numbers(small_dataset: Path) -> None:
    page = (small_dataset / "report.html").read_text()
    report = json.loads((small_dataset / "report.json").read_text())
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    table = {row[0]: row for row in rows if row}
    assert table["all"][1] == f"{tally_sum(report['read'])['documents']:,}"
    published = sum(tally_sum(report[split])["documents"] for split in ("train", "validation"))
    assert table["all"][3] == str(published)
    for reason, by_domain in report["dropped"].items():
        assert table[reason][2] == str(tally_sum(by_domain)["documents"])
    shown = "".join(read_page(page).shown)
    # A document that cleaning dropped, and two that de-duplication dropped: samples come from all stages.
    assert "Too short." in shown
    for reason in ("exact_duplicate", "near_duplicate"):
        assert f"<summary>{reason}</summary>" in page
