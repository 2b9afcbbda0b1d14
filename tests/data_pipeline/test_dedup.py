"""De-duplication removes what it found, all of it, also where a task has nothing to remove or nothing at all."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_pipeline.config import DedupSettings
from data_pipeline.dedup.pipeline import check_removed, remove_exact_duplicates, remove_near_duplicates
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.inputs.readers import InputFile, read_documents, stage_files


def text_of(seed: int) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghij", k=5)) for _ in range(200))  # digits would all count as 0


def write(folder: Path, texts_of_files: list[list[str]]) -> list[InputFile]:
    files = []
    for number, texts in enumerate(texts_of_files):
        path = folder / f"{number}.jsonl"
        records = [
            json.dumps({"text": text, "id": f"{number}/{index}", "domain": "prose"}) for index, text in enumerate(texts)
        ]
        path.write_text("\n".join(records))
        files.append(InputFile(path))
    return files


def kept(folder: Path) -> list[str]:
    return [document.id for file in stage_files(folder / "documents") for document in read_documents(file)]


def test_exact_copies_go_whichever_file_they_are_in(tmp_path: Path) -> None:
    files = write(tmp_path, [[text_of(1), text_of(2), text_of(1)], [], [text_of(2), text_of(3)], [text_of(4)]])
    remove_exact_duplicates(LocalExecutor(1), files, tmp_path / "exact")
    ids = kept(tmp_path / "exact")
    assert set(ids) >= {"0/0", "2/1", "3/0"}
    assert len({"0/1", "2/0"} & set(ids)) == 1, "datatrove keeps the copy that comes first in its own file"
    assert len(ids) == 4


def test_nothing_double_means_nothing_removed(tmp_path: Path) -> None:
    files = write(tmp_path, [[text_of(1)], [text_of(2)]])
    remove_exact_duplicates(LocalExecutor(1), files, tmp_path / "exact")
    remove_near_duplicates(LocalExecutor(1), files, tmp_path / "near", DedupSettings())
    assert kept(tmp_path / "exact") == kept(tmp_path / "near") == ["0/0", "1/0"]


def test_near_copies_go_and_different_texts_stay(tmp_path: Path) -> None:
    changed = text_of(1).split()
    changed[100] = "changed"
    files = write(tmp_path, [[text_of(1), text_of(2)], [], [text_of(3)], [" ".join(changed), "too short"]])
    remove_near_duplicates(LocalExecutor(1), files, tmp_path / "near", DedupSettings())
    ids = kept(tmp_path / "near")
    assert len({"0/0", "3/0"} & set(ids)) == 1
    assert {"0/1", "2/0", "3/1"} <= set(ids)
    assert len(ids) == 4


def test_a_removal_list_that_was_not_obeyed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "000000.remove").write_bytes(bytes(8))
    with pytest.raises(RuntimeError, match="2 duplicates were found but 0 were removed"):
        check_removed(tmp_path, [tmp_path / "000000.remove"])
