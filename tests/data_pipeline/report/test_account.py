"""Every document and byte is accounted for, by source and reason as well as by domain."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataSettings
from data_pipeline.dataset.reader import open_dataset
from data_pipeline.report.account import by_reason, source_labels


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory: pytest.TempPathFactory,
    small_documents: list[dict[str, Any]],
    corpus_writer: Callable[..., None],
    settings_for: Callable[..., DataSettings],
    run_pipeline: Callable[[DataSettings], list[str]],
) -> Path:
    """Three sources, two of one name, with documents of the same domains: copies, short ones and a broken record."""
    folder = tmp_path_factory.mktemp("account")
    corpus_writer(folder / "a" / "dump", small_documents[:80])
    corpus_writer(folder / "b" / "dump", [*small_documents[70:140], *small_documents[202:]])
    (folder / "b" / "dump" / "broken.jsonl").write_text('{"text": cut off\n')
    corpus_writer(folder / "late", [small_documents[0], small_documents[70], *small_documents[140:150]])
    sources = [{"path": str(folder / name)} for name in ("a/dump", "b/dump", "late")]
    inputs = {"piece_bytes": 20_000, "max_bad_fraction": 0.5}
    run_pipeline(settings_for(folder, folder / "out", sources=sources, inputs=inputs))
    return folder


def test_each_source_has_its_own_losses_with_their_reasons(
    prepared: Path, small_documents: list[dict[str, Any]]
) -> None:
    account = json.loads((prepared / "out" / "report.json").read_text())["by_source"]
    assert list(account) == ["dump (sources.0)", "dump (sources.1)", "late"]

    def counts(name: str, kind: str) -> dict[str, int]:
        return {reason: counts["documents"] for reason, counts in account[name][kind].items()}

    assert [account[name]["read"]["documents"] for name in account] == [80, 73, 12]
    assert counts("dump (sources.0)", "dropped") == {}
    assert counts("dump (sources.1)", "dropped") == {"empty": 1, "too_short": 1, "exact_duplicate": 10}
    assert counts("late", "dropped") == {"exact_duplicate": 2}
    assert counts("dump (sources.1)", "quarantined") == {"not_json": 1}
    assert account["late"]["dropped"]["exact_duplicate"]["bytes"] == sum(
        len(small_documents[index]["text"].encode()) for index in (0, 70)
    )


def test_what_a_source_published_is_what_the_shards_say_came_from_it(prepared: Path) -> None:
    account = json.loads((prepared / "out" / "report.json").read_text())["by_source"]
    dataset = open_dataset(prepared / "out")
    for split, stream in dataset.streams.items():
        for number, name in enumerate(account):
            chosen = [shard.utf8_bytes[shard.origins["source"] == number] for shard in stream.shards]
            assert account[name][split] == {
                "documents": sum(len(sizes) for sizes in chosen),
                "bytes": sum(int(sizes.sum()) for sizes in chosen),
            }


def test_sources_add_up_to_themselves_and_to_the_domains(prepared: Path) -> None:
    report = json.loads((prepared / "out" / "report.json").read_text())
    for unit in ("documents", "bytes"):
        for account in report["by_source"].values():
            lost = [*account["quarantined"].values(), *account["dropped"].values()]
            assert account["read"][unit] == sum(
                counts[unit] for counts in (*lost, account["train"], account["validation"])
            )
        for kind in ("read", "train", "validation"):
            by_domain = sum(counts[unit] for counts in report[kind].values())
            assert by_domain == sum(account[kind][unit] for account in report["by_source"].values())
        for reason, tally in report["dropped"].items():
            assert sum(counts[unit] for counts in tally.values()) == sum(
                account["dropped"].get(reason, {unit: 0})[unit] for account in report["by_source"].values()
            )


def test_the_page_lists_every_reason_of_every_source(prepared: Path) -> None:
    page = (prepared / "out" / "report.html").read_text()
    table = re.search(r'<table class="sources">(.*?)</table>', page)
    assert table is not None
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table[1])][1:]
    shown: dict[str, dict[str, str]] = {}
    name = ""
    for source, what, documents, *_ in rows:
        name = html.unescape(source) or name
        shown.setdefault(name, {})[what] = documents
    assert shown["dump (sources.1)"] == {
        "read": "73",
        "quarantined: not_json": "1",
        "dropped: empty": "1",
        "dropped: exact_duplicate": "10",
        "dropped: too_short": "1",
        "published": "60",
    }
    assert shown["late"]["published"] == "10"


def test_reasons_are_taken_apart_by_domain_or_by_source() -> None:
    counts, twice = {"documents": 1, "bytes": 5}, {"documents": 2, "bytes": 10}
    tally = {"a\tx\t0": counts, "a\ty\t0": counts, "b\tx\t1": counts}
    assert by_reason(tally) == {"a": {"x": counts, "y": counts}, "b": {"x": counts}}
    assert by_reason(tally, place=2) == {"a": {"0": twice}, "b": {"1": counts}}


def test_names_that_several_sources_have_are_told_apart() -> None:
    assert source_labels(["x", "y", "x"]) == ["x (sources.0)", "y", "x (sources.2)"]
