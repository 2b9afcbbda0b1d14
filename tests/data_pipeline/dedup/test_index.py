"""An index of an earlier corpus leaves out of a later one what preparing both together would."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import DataSettings, DedupSettings
from data_pipeline.dedup.exact import remove_exact_duplicates
from data_pipeline.dedup.index import check_index_target, open_indices, settings_of_kinds, write_index
from data_pipeline.dedup.minhash import SignMinHash, remove_near_duplicates
from data_pipeline.dedup.procedure import Indexing
from data_pipeline.dedup.sentences import remove_duplicate_sentences
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.inputs.readers import InputFile, read_documents, stage_files
from launch.settings import BadInputError, parse_settings

TextOf = Callable[[int], str]
WritePieces = Callable[[Path, Sequence[Sequence[str]]], list[InputFile]]
Kept = Callable[[Path], list[str]]
SETTINGS = DedupSettings(sentences=True, min_words_left=0)
PROBES = {"exact": "0367dba00e110b8c", "minhash": "b6ba6b02611ee04e", "sentences": "c07bf94744d4c24c"}


def prepare_keys(folder: Path, files: Sequence[InputFile], settings: DedupSettings) -> dict[str, Path]:
    """The three kinds one after the other; returns the folders of their new keys."""
    executor, opened = LocalExecutor(1), open_indices(settings)

    def indexing(kind: str) -> Indexing:
        return Indexing(tuple(index.keys_of(kind) for index in opened), keep=True)

    remove_exact_duplicates(executor, files, folder / "exact", settings.exact_text, indexing("exact"))
    files = stage_files(folder / "exact" / "documents")
    remove_near_duplicates(executor, files, folder / "minhash", settings, indexing("minhash"))
    files = stage_files(folder / "minhash" / "documents")
    remove_duplicate_sentences(executor, files, folder / "sentences", settings, indexing("sentences"))
    return {kind: folder / kind / "index" / kind for kind in ("exact", "minhash", "sentences")}


def texts_of(folder: Path) -> list[str]:
    return [doc.text for file in stage_files(folder / "documents") for doc in read_documents(file)]


@pytest.fixture(scope="module")
def made_index(tmp_path_factory: pytest.TempPathFactory, text_of: TextOf, write_pieces: WritePieces) -> Path:
    """The index of ten texts and an exact copy; tests must not change it."""
    folder = tmp_path_factory.mktemp("index")
    files = write_pieces(folder / "in", [[text_of(seed) for seed in range(10)], [text_of(3)]])
    write_index(folder / "index", "dump1", SETTINGS, prepare_keys(folder / "work", files, SETTINGS))
    return folder / "index"


def test_against_an_index_as_if_both_corpora_were_one(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces
) -> None:
    generator = random.Random(3)

    def near(text: str) -> str:
        words = text.split()
        words[generator.randrange(len(words))] = "changed"
        return ". ".join(" ".join(words[start : start + 8]) for start in range(0, 200, 8))

    base = [near(text_of(seed)) for seed in range(12)]
    mixed = [generator.choice(base) for _ in range(12)] + [near(text_of(seed % 20)) for seed in range(24)]
    mixed += [mixed[0][:600] + near(text_of(99))]
    generator.shuffle(mixed)
    old, new = [mixed[:8], mixed[8:16]], [mixed[16:25], mixed[25:]]
    keys = prepare_keys(tmp_path / "old", write_pieces(tmp_path / "in_old", old), SETTINGS)
    assert write_index(tmp_path / "index", "old", SETTINGS, keys)
    assert not write_index(tmp_path / "index", "old", SETTINGS, keys), "already there"
    later = SETTINGS.model_copy(update={"against": (str(tmp_path / "index"),)})
    prepare_keys(tmp_path / "new", write_pieces(tmp_path / "in_new", new), later)
    prepare_keys(tmp_path / "both", write_pieces(tmp_path / "in_both", old + new), SETTINGS)
    for stage in ("exact", "minhash", "sentences"):
        together = stage_files(tmp_path / "both" / stage / "documents")[2:]
        assert texts_of(tmp_path / "new" / stage) == [doc.text for file in together for doc in read_documents(file)]
    reasons = {
        doc.metadata["filter_reason"]
        for stage in ("exact", "minhash")
        for file in stage_files(tmp_path / "new" / stage / "dropped")
        for doc in read_documents(file)
    }
    assert reasons >= {"exact_duplicate_in_index", "near_duplicate_in_index"}


def test_a_third_corpus_against_two_indices(
    tmp_path: Path, made_index: Path, text_of: TextOf, write_pieces: WritePieces, kept: Kept
) -> None:
    second = SETTINGS.model_copy(update={"against": (str(made_index),)})
    files = write_pieces(tmp_path / "in2", [[text_of(3), text_of(20)]])
    write_index(tmp_path / "index2", "dump2", second, prepare_keys(tmp_path / "two", files, second))
    exact_keys = (tmp_path / "index2" / "exact" / "bucket_000" / "00000.exact.index").read_bytes()
    assert len(exact_keys) == 16, "only what the first index has not"
    third = SETTINGS.model_copy(update={"against": (str(made_index), str(tmp_path / "index2"))})
    files = write_pieces(tmp_path / "in3", [[text_of(20), text_of(5), text_of(21)]])
    prepare_keys(tmp_path / "three", files, third)
    assert kept(tmp_path / "three" / "sentences") == ["0/2"]


def test_datatrove_reads_the_index(tmp_path: Path, made_index: Path, text_of: TextOf) -> None:
    documents = [Document(text=text_of(seed), id=str(seed)) for seed in (50, 4, 51)]
    SignMinHash(tmp_path / "signatures", SETTINGS).run(documents, 0, 1)
    config = MinhashConfig(SETTINGS.ngram, SETTINGS.buckets, SETTINGS.hashes_per_bucket, SETTINGS.seed)
    step = MinhashDedupBuckets(
        str(tmp_path / "signatures"),
        str(tmp_path / "pairs"),
        str(made_index / "minhash"),
        config,
        only_dedup_in_index=False,
    )
    for bucket in range(SETTINGS.buckets):
        step.run(None, bucket, SETTINGS.buckets)
    pairs = {
        tuple(row)
        for path in (tmp_path / "pairs").iterdir()
        for row in np.fromfile(path, "<u4").reshape(-1, 4).tolist()
    }
    assert pairs == {(2**32 - 1, 2**32 - 1, 0, 1)}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ngram": 6}, r"dedup\.against\.0 = .*: was made with dedup\.ngram = 5, here it is 6"),
        ({"buckets": 20}, r"dedup\.buckets = 14, here it is 20"),
        ({"hashes_per_bucket": 9}, r"dedup\.hashes_per_bucket = 8, here it is 9"),
        ({"seed": 2}, r"dedup\.seed = 1, here it is 2"),
        ({"exact_text": "normalised"}, r"dedup\.exact_text = 'plain', here it is 'normalised'"),
        ({"sentence_span": 2}, r"dedup\.sentence_span = 3, here it is 2"),
    ],
)
def test_an_index_made_with_other_settings_is_refused_by_their_name(
    made_index: Path, changed: dict[str, Any], message: str
) -> None:
    settings = SETTINGS.model_copy(update={**changed, "against": (str(made_index),)})
    with pytest.raises(BadInputError, match=message):
        open_indices(settings)
    unused = {"minhash": "ngram buckets hashes_per_bucket seed", "exact": "exact_text", "sentences": "sentence_span"}
    kind = next(kind for kind, names in unused.items() if next(iter(changed)) in names.split())
    assert open_indices(settings.model_copy(update={kind: False})), "settings of what is not compared do not matter"


def test_an_index_that_lacks_a_kind_or_was_made_by_another_version_is_refused(tmp_path: Path) -> None:
    plain = DedupSettings(minhash=False)
    write_index(tmp_path / "index", "dump", plain, {})
    against = {"against": (str(tmp_path / "index"),)}
    with pytest.raises(
        BadInputError, match=r"has no keys of kind 'minhash' \(it has exact\); set dedup.minhash = false"
    ):
        open_indices(DedupSettings().model_copy(update=against))
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    manifest["kinds"]["exact"]["probe"] = "0" * 32
    (tmp_path / "index" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInputError, match="its exact keys were made by another version of this program"):
        open_indices(plain.model_copy(update=against))


def test_probes_do_not_change_between_releases_unnoticed() -> None:
    kinds = settings_of_kinds(SETTINGS)
    probes = {kind: str(values["probe"])[:16] for kind, values in kinds.items()}
    assert probes == PROBES, "indices made before this change are refused: say so in the change log"


def test_a_damaged_index_is_refused(tmp_path: Path, made_index: Path) -> None:
    index = tmp_path / "index"
    shutil.copytree(made_index, index)
    settings = SETTINGS.model_copy(update={"against": (str(index),)})
    file = index / "minhash" / "bucket_003" / "00000.minhash.index"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(BadInputError, match=r"bucket_003/00000\.minhash\.index is missing or damaged"):
        open_indices(settings)[0].keys_of("minhash")
    file.write_bytes(content)
    (file.parent / "00001.minhash.index").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"00001.minhash.index is not in the index's manifest"):
        open_indices(settings)[0].keys_of("minhash")
    manifest = json.loads((index / "manifest.json").read_text())
    manifest["files"]["exact/../../x"] = next(iter(manifest["files"].values()))
    (index / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadInputError, match="names a file outside of it"):
        open_indices(settings)[0].keys_of("exact")
    with pytest.raises(BadInputError, match="holds no index"):
        open_indices(SETTINGS.model_copy(update={"against": (str(tmp_path),)}))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_any_json_as_a_manifest_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(BadInputError):
        open_indices(SETTINGS.model_copy(update={"against": (str(folder),)}))


def test_anothers_index_is_not_overwritten(tmp_path: Path, made_index: Path) -> None:
    check_index_target(made_index, "dump1")
    check_index_target(tmp_path / "new", "dump1")
    with pytest.raises(BadInputError, match=r"holds the index of 'dump1'; name another folder"):
        check_index_target(made_index, "dump2")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInputError, match="holds no index"):
        check_index_target(tmp_path, "dump1")
    with pytest.raises(BadInputError, match="is a file"):
        check_index_target(tmp_path / "notes.txt", "dump1")


@pytest.mark.parametrize(
    ("dedup", "message"),
    [
        ({"index": "a", "against": ["a/"]}, r"dedup\.index = \"a\": is also in against"),
        ({"index": "a", "exact": False, "minhash": False}, r"dedup\.index = \"a\": no keys are made"),
        ({"exact": False, "minhash": False, "against": ["a"]}, r"dedup\.against = .*: no keys are made"),
    ],
)
def test_indices_that_make_no_sense_are_refused(dedup: dict[str, Any], message: str) -> None:
    values = {"name": "x", "output": "x", "sources": [{"path": "x"}], "dedup": dedup}
    with pytest.raises(BadInputError, match=message):
        parse_settings(DataSettings, values, "file")
