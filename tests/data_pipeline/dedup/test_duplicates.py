"""Exact and near copies go, the first copy stays, and what was to be removed is removed and counted."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clean.words import FastWords
from data_pipeline.config import DedupSettings
from data_pipeline.dedup.clusters import removal_file
from data_pipeline.dedup.exact import exact_digest, remove_exact_duplicates
from data_pipeline.dedup.minhash import BLOCK, MERSENNE_PRIME, MinHasher, SignMinHash, remove_near_duplicates
from data_pipeline.dedup.procedure import RemoveDuplicates, check_removed
from data_pipeline.execution.executors import LocalExecutor
from data_pipeline.execution.tally import DroppedWriter, read_tallies
from data_pipeline.inputs.readers import InputFile, read_documents, stage_files

TextOf = Callable[[int], str]
WritePieces = Callable[[Path, Sequence[Sequence[str]]], list[InputFile]]
Kept = Callable[[Path], list[str]]


def changed(text: str, word: int) -> str:
    words = text.split()
    words[word] = "changed"
    return " ".join(words)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("documents", "dropped", "tallies", "index")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }


def test_the_first_exact_copy_stays_whichever_piece_and_place_it_has(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces, kept: Kept
) -> None:
    pieces = [[text_of(1), text_of(2), text_of(1)], [], [text_of(2), text_of(3)], [text_of(4), text_of(1)]]
    remove_exact_duplicates(LocalExecutor(1), write_pieces(tmp_path / "in", pieces), tmp_path / "exact")
    assert kept(tmp_path / "exact") == ["0/0", "0/1", "2/1", "3/0"]
    dropped = [
        (doc.id, doc.metadata["duplicate_of"], doc.metadata["filter_reason"])
        for file in stage_files(tmp_path / "exact" / "dropped")
        for doc in read_documents(file)
    ]
    assert dropped == [
        ("0/2", "00000/0", "exact_duplicate"),
        ("2/0", "00000/1", "exact_duplicate"),
        ("3/1", "00000/0", "exact_duplicate"),
    ]
    tally = read_tallies(tmp_path / "exact" / "tallies" / "dropped")
    assert tally == {"exact_duplicate\tprose\t": {"documents": 3, "bytes": 3 * 1199}}


def test_the_first_near_copy_stays_and_short_and_other_texts_do(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces, kept: Kept
) -> None:
    one = text_of(1)
    chain = [changed(one, 100), changed(changed(one, 100), 20), changed(changed(changed(one, 100), 20), 180)]
    pieces = [[text_of(2), "too short"], [], [chain[2], text_of(3)], [one, chain[0], "too short", "", ""], [chain[1]]]
    files = write_pieces(tmp_path / "in", pieces)
    remove_near_duplicates(LocalExecutor(1), files, tmp_path / "near", DedupSettings())
    assert kept(tmp_path / "near") == ["0/0", "0/1", "2/0", "2/1", "3/2", "3/3", "3/4"]


@pytest.mark.parametrize(
    "texts",
    [[[]], [["one document"]], [["", "", ""]], [["a b c d e f"] * 5, ["a b c d e f"] * 3], [[], ["a b c d e f"], []]],
)
def test_odd_corpora_keep_one_of_each_text(
    tmp_path: Path, write_pieces: WritePieces, kept: Kept, texts: list[list[str]]
) -> None:
    files = write_pieces(tmp_path / "in", texts)
    remove_exact_duplicates(LocalExecutor(1), files, tmp_path / "exact")
    remove_near_duplicates(
        LocalExecutor(1), stage_files(tmp_path / "exact" / "documents"), tmp_path / "near", DedupSettings()
    )
    assert len(kept(tmp_path / "near")) == len({text for piece in texts for text in piece})
    assert len(stage_files(tmp_path / "near" / "documents")) == len(texts)


def test_documents_with_the_same_id_are_different_documents(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces, kept: Kept
) -> None:
    files = write_pieces(tmp_path / "in", [[text_of(1)], [text_of(1), text_of(2)]])
    for file in files:
        file.path.write_text(file.path.read_text().replace('"1/0"', '"same"').replace('"1/1"', '"same"'))
    remove_exact_duplicates(LocalExecutor(1), files, tmp_path / "exact")
    assert kept(tmp_path / "exact") == ["0/0", "same"]


def test_normalised_texts_may_differ_in_form_but_not_in_numbers() -> None:
    assert exact_digest("Caf\u00e9, 12 o'clock!", "normalised") == exact_digest("cafe\n12 O CLOCK", "normalised")
    assert exact_digest("Caf\u00e9, 12 o'clock!", "plain") != exact_digest("cafe\n12 O CLOCK", "plain")
    assert exact_digest("chapter 12", "normalised") != exact_digest("chapter 13", "normalised")
    assert exact_digest("???", "normalised") != exact_digest("!!!", "normalised")


def test_the_same_bytes_on_one_worker_and_on_two_and_with_many_ranges(
    tmp_path: Path, text_of: TextOf, write_pieces: WritePieces
) -> None:
    generator = random.Random(0)
    texts = [text_of(seed) for seed in range(20)]
    copies = [changed(generator.choice(texts), generator.randrange(200)) for _ in range(30)]
    everything = texts + copies
    generator.shuffle(everything)
    files = write_pieces(tmp_path / "in", [everything[start : start + 9] for start in range(0, 50, 9)])
    results = []
    for name, workers, range_bytes in (("a", 1, 1 << 29), ("b", 2, 1 << 29), ("c", 1, 2000)):
        remove_near_duplicates(LocalExecutor(workers), files, tmp_path / name, DedupSettings(), range_bytes=range_bytes)
        results.append(bytes_of(tmp_path / name))
        shutil.rmtree(tmp_path / name / "logs")
    assert results[0] == results[1] == results[2]
    assert any("dropped" in name for name in results[0])


@given(st.integers(1, 3 * BLOCK), st.integers(0, 2**32 - 1))
def test_a_signature_is_the_least_value_of_each_function(count: int, seed: int) -> None:
    hasher = MinHasher(ngram=5, buckets=3, hashes_per_bucket=2, seed=seed)
    shingles = np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)
    generator = np.random.RandomState(seed)
    a, b = (generator.randint(low, MERSENNE_PRIME, dtype=np.uint64, size=(1, 6)) for low in (1, 0))
    values = [
        min((int(x) * int(a_i) + int(b_i)) % 2**64 % (2**61 - 1) for x in shingles[:200])
        for a_i, b_i in zip(a[0], b[0], strict=True)
    ]
    assert hasher.signature(shingles[:200]).tolist() == values
    stock = np.min((shingles[:, None] * a + b) % MERSENNE_PRIME, axis=0)
    assert (hasher.signature(shingles) == stock).all()


def make_corpus() -> list[list[str]]:
    """English-looking and other texts, with near copies; texts of no, few and many words."""
    generator = random.Random(5)
    words = [
        "the",
        "of",
        "Stra\u00dfe",
        "1,200",
        "caf\u00e9",
        "don't",
        "e-mail",
        "\u4e2d\u6587",
        "(and)",
        "market.",
        "x\u00b2",
    ]
    texts = [" ".join(generator.choices(words, k=generator.choice([3, 40, 300]))) for _ in range(60)]
    texts += [changed(text, 0) for text in texts[:25]] + ["", "!!!", " ".join(generator.choices(words, k=3000))]
    generator.shuffle(texts)
    return [texts[:30], [], texts[30:31], texts[31:]]


def test_signatures_and_clusters_are_datatroves(tmp_path: Path, write_pieces: WritePieces) -> None:
    settings = DedupSettings(seed=7)
    config = MinhashConfig(settings.ngram, settings.buckets, settings.hashes_per_bucket, settings.seed)
    corpus = make_corpus()
    theirs = tmp_path / "theirs"
    for piece, texts in enumerate(corpus):
        documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
        SignMinHash(tmp_path / "ours", settings).run(documents, piece, len(corpus))
        MinhashDedupSignature(str(theirs / "signatures"), config, language=FastWords()).run(
            documents, piece, len(corpus)
        )
    for bucket in range(settings.buckets):
        for piece in range(len(corpus)):
            name = f"bucket_{bucket:03d}/{piece:05d}.minhash.sig"
            assert (tmp_path / "ours" / name).read_bytes() == (theirs / "signatures" / name).read_bytes()
    buckets = MinhashDedupBuckets(
        str(theirs / "signatures"), str(theirs / "buckets"), config=config, only_dedup_in_index=False
    )
    for bucket in range(settings.buckets):
        buckets.run(None, bucket, settings.buckets)
    MinhashDedupCluster(str(theirs / "buckets"), str(theirs / "clusters"), config, save_cluster_id=True).run(None, 0, 1)
    clusters: dict[int, set[tuple[int, int]]] = {}
    for path in (theirs / "clusters").glob("*.clusters"):
        for document, cluster in np.fromfile(path, "<u4").reshape(-1, 2).tolist():
            clusters.setdefault(cluster, set()).add((int(path.name.split(".")[0]), document))
    expected = {place: min(cluster) for cluster in clusters.values() for place in cluster if place != min(cluster)}

    # Our own removals, read before the stage's scratch folder would be removed.
    files = write_pieces(tmp_path / "in", corpus)
    remove_near_duplicates(LocalExecutor(1), files, tmp_path / "near", settings)
    found = {}
    for piece in range(len(corpus)):
        for document, kept_piece, kept_document in (
            np.fromfile(removal_file(tmp_path / "near" / "scratch" / "removals", piece), "<u4").reshape(-1, 3).tolist()
        ):
            found[piece, document] = (kept_piece, kept_document)
    assert found == expected
    assert len(found) > 15


def test_a_removal_list_that_is_missing_or_anothers_is_an_error(tmp_path: Path, text_of: TextOf) -> None:
    def remove(documents: int, removals: Path) -> list[Document]:
        dropped = DroppedWriter(tmp_path / "dropped", tmp_path / "tallies" / "dropped")
        step = RemoveDuplicates(removals, "exact_duplicate", [2], dropped)
        corpus = [Document(text=text_of(i), id=str(i), metadata={"domain": "prose"}) for i in range(documents)]
        return list(step.run(corpus, 0, 1))

    with pytest.raises(FileNotFoundError):
        remove(2, tmp_path)
    removal_file(tmp_path, 0).write_bytes(b"")
    assert len(remove(2, tmp_path)) == 2
    with pytest.raises(RuntimeError, match="3 documents and 0 removals, where 2 documents were signed"):
        remove(3, tmp_path)
    removal_file(tmp_path, 0).write_bytes(np.array([5, 0, 0], "<u4").tobytes())
    with pytest.raises(RuntimeError, match="0 removals, where 2 documents were signed and 1 are to be removed"):
        remove(2, tmp_path)
    with pytest.raises(RuntimeError, match="1 duplicates were found but 0 were removed"):
        check_removed(tmp_path, tmp_path, 1)
