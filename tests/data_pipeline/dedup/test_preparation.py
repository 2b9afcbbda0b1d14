"""De-duplication and decontamination as parts of a preparation: settings, accounting, skipping, an index published."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataSettings
from data_pipeline.dataset.reader import open_dataset
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.progress import Reporter
from data_pipeline.preparation import prepare
from launch.settings import BadInputError

SettingsFor = Callable[..., DataSettings]
RunPipeline = Callable[[DataSettings], list[str]]
CorpusWriter = Callable[..., None]


def texts_of(folder: Path) -> set[str]:
    dataset = open_dataset(folder, verify=True)
    texts = [
        dataset.tokenizer.decode(shard.document(index).tolist())
        for stream in dataset.streams.values()
        for shard in stream.shards
        for index in range(shard.document_ends.size)
    ]
    assert max(Counter(texts).values()) == 1
    return set(texts)


def test_every_switch_on_and_every_byte_accounted_for(
    small_documents: list[dict[str, Any]],
    corpus_writer: CorpusWriter,
    tmp_path: Path,
    settings_for: SettingsFor,
    run_pipeline: RunPipeline,
) -> None:
    asked = " ".join(small_documents[20]["text"].split()[10:40])
    passage = " ".join(small_documents[30]["text"].split()[:80])
    documents = [
        *small_documents,
        {**small_documents[40], "id": "with-passage", "text": f"{passage} {small_documents[40]['text']}"},
    ]
    corpus_writer(tmp_path / "corpus", documents)
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": asked}) + "\n")
    sections = {
        "dedup": {"sentences": True, "index": str(tmp_path / "index")},
        "decontamination": {
            "sets": [{"name": "quiz", "path": str(tmp_path / "quiz.jsonl"), "fields": ["question"]}],
            "action": "cut",
        },
    }
    settings = settings_for(tmp_path / "corpus", tmp_path / "data", **sections)
    run_pipeline(settings)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["dropped"]["contaminated_cut"]["prose"]["bytes"] >= len(asked)
    assert report["dropped"]["duplicate_sentences_cut"]
    assert report["decontamination"]["quiz"]["items_found"] == 1
    for domain, read in report["read"].items():
        for unit in ("documents", "bytes"):
            parts = [report["train"], report["validation"], *report["dropped"].values()]
            assert read[unit] == sum(part.get(domain, {unit: 0})[unit] for part in parts)
    assert not any(asked in text for text in texts_of(tmp_path / "data"))

    lines = run_pipeline(settings)
    assert all("already done" in line for line in lines if line.split()[0] in ("exact", "sentences", "decontaminate"))
    assert any(line.split() == ["index", "already", "done"] for line in lines)

    # With two workers, elsewhere: the same data and the same index.
    again = settings_for(tmp_path / "corpus", tmp_path / "data2", **sections, execution={"workers": 2})
    shutil.move(tmp_path / "index", tmp_path / "index1")
    run_pipeline(again)
    assert open_dataset(tmp_path / "data2").fingerprint == open_dataset(tmp_path / "data").fingerprint
    assert (tmp_path / "index" / "manifest.json").read_bytes() == (tmp_path / "index1" / "manifest.json").read_bytes()


def test_a_later_dump_leaves_out_what_an_earlier_one_has(
    small_documents: list[dict[str, Any]],
    corpus_writer: CorpusWriter,
    tmp_path: Path,
    settings_for: SettingsFor,
    run_pipeline: RunPipeline,
) -> None:
    corpus_writer(tmp_path / "first", small_documents[:110])
    corpus_writer(tmp_path / "second", small_documents[90:])
    index = {"index": str(tmp_path / "index")}
    run_pipeline(settings_for(tmp_path / "first", tmp_path / "data1", dedup=index))
    later = settings_for(tmp_path / "second", tmp_path / "data2", dedup={"against": [str(tmp_path / "index")]})
    run_pipeline(later)
    assert texts_of(tmp_path / "data2") == {document["text"] for document in small_documents[110:200]}
    dropped = json.loads((tmp_path / "data2" / "report.json").read_text())["dropped"]
    counts = {reason: sum(c["documents"] for c in tally.values()) for reason, tally in dropped.items()}
    # Of the copies of documents 5 and 8, which the first dump has, one is exact.
    assert counts == {"empty": 1, "too_short": 1, "exact_duplicate_in_index": 21, "near_duplicate_in_index": 1}

    shutil.rmtree(tmp_path / "index")
    with pytest.raises(BadInputError, match="holds no index"):
        prepare(later, LocalExecutor(1), Reporter())
