"""Selections and packings, against documents taken one by one from the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.dataset.reader import Dataset
from launch.settings import BadInputError
from pretrain.data import packing
from pretrain.data.packing import BestFit, Concatenated, Packing, Row, _best_fit
from pretrain.data.selection import DocumentStream, Selection, chosen_documents

END = 1


def documents_of(dataset: Dataset, chosen: NDArray[np.bool_] | None = None) -> list[list[int]]:
    """The training documents' tokens, end tokens included, in stream order."""
    found = [
        shard.document(index).tolist()
        for shard in dataset.split("train").shards
        for index in range(shard.document_ends.size)
    ]
    return [document for document, keep in zip(found, chosen, strict=True) if keep] if chosen is not None else found


def some(dataset: Dataset, seed: int) -> NDArray[np.bool_]:
    return np.random.default_rng(seed).random(len(documents_of(dataset))) < 0.5


@settings(max_examples=60)
@given(st.integers(0, 1000), st.floats(0, 1), st.integers(0, 300))
def test_a_selection_reads_as_its_documents_one_after_the_other(
    dataset: Dataset, seed: int, place: float, count: int
) -> None:
    chosen = some(dataset, seed)
    stream = DocumentStream(dataset.split("train"), chosen)
    documents = documents_of(dataset, chosen)
    expected = [token for document in documents for token in document]
    assert stream.total_tokens == len(expected)
    start = int(place * len(expected))
    count = min(count, len(expected) - start)
    assert stream.read(start, count).tolist() == expected[start : start + count]
    ends = np.cumsum([len(document) for document in documents])
    inside = ends[(ends > start) & (ends <= start + count)]
    assert stream.document_ends(start, count).tolist() == inside.tolist()
    whole = DocumentStream(dataset.split("train"))
    assert (
        whole.document_ends(0, whole.total_tokens).tolist() == np.cumsum(list(map(len, documents_of(dataset)))).tolist()
    )
    with pytest.raises(IndexError):
        stream.read(start, len(expected) - start + 1)
    with pytest.raises(IndexError):
        stream.document_ends(-1, 1)


def test_selections_by_domain_length_and_difficulty_are_the_documents_that_say_so(dataset: Dataset) -> None:
    shards = dataset.split("train").shards
    lengths = np.array([len(document) - 1 for document in documents_of(dataset)])
    domains = np.concatenate([shard.domain_ids for shard in shards])
    bytes_ = np.concatenate([shard.utf8_bytes for shard in shards])
    chosen = chosen_documents(dataset, "train", Selection(domains=("c", "a"), min_document_tokens=10))
    np.testing.assert_array_equal(chosen, (domains != 1) & (lengths >= 10))
    chosen = chosen_documents(dataset, "train", Selection(max_document_tokens=10))
    np.testing.assert_array_equal(chosen, lengths <= 10)
    easy = chosen_documents(dataset, "train", Selection(difficulty=(0, 0.25)))
    rest = chosen_documents(dataset, "train", Selection(difficulty=(0.25, 1)))
    np.testing.assert_array_equal(easy, ~rest)
    assert easy.sum() == -(-len(lengths) // 4)
    difficulty = (lengths + 1) / bytes_
    assert difficulty[easy].max() <= difficulty[rest].min()
    bound = 10 / len(lengths)  # falls on a document, which belongs to the upper part
    assert chosen_documents(dataset, "train", Selection(difficulty=(0, bound))).sum() == 10
    assert chosen_documents(dataset, "train", Selection(difficulty=(bound, 1))).sum() == len(lengths) - 10
    with pytest.raises(BadInputError, match=r"domain 'web' is not one of .*: a, b, c"):
        chosen_documents(dataset, "train", Selection(domains=("web",)))


def test_difficulty_from_a_file_counts_by_its_content(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "loss.npy"
    n = len(documents_of(dataset))
    np.save(path, np.arange(n)[::-1].astype(np.float32))
    selection = Selection(difficulty=(0, 0.5), difficulty_file=str(path))
    chosen = chosen_documents(dataset, "train", selection)
    assert chosen.tolist() == [False] * (n // 2) + [True] * (n - n // 2)
    before = selection.key()
    np.save(path, np.arange(n))
    assert selection.key() != before
    assert Selection().key() == ""


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path, n: np.save(path, np.zeros(n + 1)), "holds float64"),
        (lambda path, n: np.save(path, np.full(n, np.nan)), "not finite"),
        (lambda path, n: np.save(path, np.array([None] * n)), "not a .npy file of numbers"),
        (lambda path, n: np.save(path, np.array(["x"] * n)), "holds <U1"),
        (lambda path, n: np.savez(path.open("wb"), np.zeros(n)), "an archive of arrays"),
        (lambda path, n: path.write_bytes(b""), "not a .npy file"),
        (lambda path, n: path.write_bytes(b"\x93NUMPY\x01"), "not a .npy file"),
        (lambda path, n: None, "not a .npy file"),
    ],
)
def test_an_unusable_difficulty_file_is_one_line(
    dataset: Dataset, tmp_path: Path, write: Callable[[Path, int], None], told: str
) -> None:
    path = tmp_path / "loss.npy"
    write(path, len(documents_of(dataset)))
    with pytest.raises(BadInputError, match=told) as error:
        chosen_documents(dataset, "train", Selection(difficulty=(0, 0.5), difficulty_file=str(path)))
    assert str(path) in str(error.value)


def test_document_ends_that_do_not_rise_are_named_not_believed(
    dataset_maker: Callable[..., Dataset], tmp_path: Path
) -> None:
    from dataclasses import replace

    stream = dataset_maker(tmp_path).split("train")
    ends = np.array(stream.shards[0].document_ends)
    ends[2], ends[3] = ends[3], ends[2]
    stream.shards[0] = replace(stream.shards[0], document_ends=ends)
    with pytest.raises(BadInputError, match="document ends do not rise"):
        DocumentStream(stream).document_ends(0, stream.total_tokens)


def rows_of(packed: Packing, length: int) -> list[Row]:
    return [packed.read(row, 0, length, True) for row in range(packed.n_rows)]


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 200))
def test_concatenated_rows_number_the_document_of_each_target(dataset: Dataset, seed: int, length: int) -> None:
    chosen = some(dataset, seed)
    stream = DocumentStream(dataset.split("train"), chosen)
    documents = documents_of(dataset, chosen)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    packed = Concatenated(stream, length)
    assert packed.n_rows == (stream.total_tokens - 1) // length
    for row, read in enumerate(rows_of(packed, length)):
        np.testing.assert_array_equal(read.tokens, stream.read(row * length, length + 1))
        assert read.counted is None
        assert read.document_ids is not None
        of_targets = owner[row * length + 1 : (row + 1) * length + 1]
        np.testing.assert_array_equal(read.document_ids, of_targets - of_targets[0])
        # An input and its target have one document, so an end token opens the next one.
        changes = np.flatnonzero(np.diff(read.document_ids)) + 1
        assert (read.tokens[changes] == END).all()
    if packed.n_rows and length % 2 == 0:
        half = packed.read(0, length // 2, length // 2, True)
        np.testing.assert_array_equal(half.tokens, stream.read(length // 2, length // 2 + 1))


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 200), st.integers(1, 8))
def test_best_fit_makes_every_token_a_target_once_and_cuts_no_document_that_fits(
    dataset: Dataset, seed: int, length: int, window_rows: int
) -> None:
    chosen = some(dataset, seed)
    documents = documents_of(dataset, chosen)
    stream = DocumentStream(dataset.split("train"), chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_ROWS", window_rows)
        packed = BestFit(stream, length, END)
    wanted, got = Counter(map(tuple, documents)), Counter[tuple[int, ...]]()
    targets: Counter[int] = Counter()
    for row in rows_of(packed, length):
        assert row.tokens.shape == (length + 1,)
        assert row.counted is not None
        assert row.document_ids is not None
        targets.update(row.tokens[1:][row.counted].tolist())
        assert (np.diff(row.document_ids) >= 0).all()
        assert (np.diff(row.document_ids) <= 1).all()
        for number in np.unique(row.document_ids[row.counted]):
            mine = row.document_ids == number
            text = row.tokens[1:][mine & row.counted].tolist()
            begin = int(np.flatnonzero(mine)[0])
            if row.tokens[begin] == END and text[-1] == END:
                got[tuple(text)] += 1
    assert targets == Counter(token for document in documents for token in document)
    for document, count in wanted.items():
        if len(document) <= length:
            assert got[document] >= count, "cut, though it fits a row"
    assert packed.padding_share == pytest.approx(1 - stream.total_tokens / (packed.n_rows * length))
    assert packed.n_rows * length >= stream.total_tokens


@settings(max_examples=40)
@given(st.integers(0, 1000), st.integers(2, 60))
def test_best_fit_inputs_before_a_piece_are_what_the_text_had_before_it(
    dataset: Dataset, seed: int, length: int
) -> None:
    """Every counted target is predicted from the token that really came before it, or from an end token."""
    documents = documents_of(dataset, some(dataset, seed))
    pairs = {pair for document in documents for pair in zip([END, *document], document, strict=False)}
    packed = BestFit(DocumentStream(dataset.split("train"), some(dataset, seed)), length, END)
    for row in rows_of(packed, length):
        inputs, targets = row.tokens[:-1][row.counted], row.tokens[1:][row.counted]
        assert {*zip(inputs.tolist(), targets.tolist(), strict=True)} <= pairs


def test_a_rest_is_read_but_not_counted_twice_behind_another_document() -> None:
    class Stream(DocumentStream):
        """Documents of 7, 2 and 3 tokens. The first fills a row of 6; its rest is 2 with the token before it."""

        def __init__(self) -> None:
            self._tokens = np.array([10, 11, 12, 13, 14, 15, END, 20, END, 30, 31, END])
            self.total_tokens = self._tokens.size

        def read(self, start: int, count: int) -> NDArray[np.int64]:
            return self._tokens[start : start + count]

        def document_ends(self, start: int, count: int) -> NDArray[np.int64]:
            ends = np.flatnonzero(self._tokens == END) + 1
            return ends[(ends > start) & (ends <= start + count)]

    packed = BestFit(Stream(), 6, END)
    rows = rows_of(packed, 6)
    assert [row.tokens.tolist() for row in rows] == [
        [END, 10, 11, 12, 13, 14, 15],
        [END, 30, 31, END, 15, END, END],  # the rest's first token is only an input
        [END, 20, END, END, END, END, END],
    ]
    assert [row.counted.astype(int).tolist() for row in rows if row.counted is not None] == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 0],
    ]
    assert [row.document_ids.tolist() for row in rows if row.document_ids is not None] == [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 2],
        [0, 0, 1, 1, 1, 1],
    ]
    with pytest.raises(ValueError, match="cannot be read in parts"):
        packed.read(0, 0, 3, False)
    with pytest.raises(IndexError):
        packed.read(packed.n_rows, 0, 6, False)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_best_fit_is_the_definition(lengths: list[int]) -> None:
    lengths = sorted(lengths, reverse=True)
    room: list[int] = []
    expected = []
    for length in lengths:
        fitting = [(left, row) for row, left in enumerate(room) if left >= length]
        if fitting:
            row = min(fitting)[1]
        else:
            row = len(room)
            room.append(30)
        room[row] -= length
        expected.append(row)
    assert _best_fit(lengths, 30) == expected
