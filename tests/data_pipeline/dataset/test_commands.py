"""``verify``, ``inspect`` and ``export`` as a user runs them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.dataset import export
from data_pipeline.dataset.reader import open_dataset
from data_pipeline.main import main
from launch.settings import BadInputError


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_verify_reads_everything_and_names_an_edited_shard(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "15 files" in printed(capsys, "verify", str(made))
    path = made / "train/shard_00001.bin"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"train/shard_00001\.bin: wrong sha256"):
        main(["verify", str(made)])


def test_inspect_shows_what_is_there(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "inspect", str(made))
    for word in ("train", "validation", "law", "prose", "2 train, 1 validation", "3 files of 2 sources", "uint16"):
        assert word in shown


def test_inspect_shows_a_document_decoded_with_its_origin(
    made: Path, made_texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = printed(capsys, "inspect", str(made), "--document", "6")
    assert "train 6 (shard_00001.bin 1), law" in shown
    assert "Document number 6 speaks of rivers, </s> and of harbours." in shown
    assert "dump: a.jsonl at 600" in shown
    assert "books: c.txt at 0" in printed(capsys, "inspect", str(made), "--search", "number 7")
    assert "number 10" in printed(capsys, "inspect", str(made), "--split", "validation", "--document", "1")


def test_inspect_searches_filters_and_limits(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prose = printed(capsys, "inspect", str(made), "--domain", "prose", "--limit", "3")
    assert [f"number {number} " in prose for number in range(9)] == [n in (1, 3, 5) for n in range(9)]
    assert "only the first 3 are shown" in prose
    with pytest.raises(BadInputError, match="--search 'nowhere': no document of train contains it"):
        main(["inspect", str(made), "--search", "nowhere"])
    with pytest.raises(BadInputError, match="--document 9: train has documents 0 to 8"):
        main(["inspect", str(made), "--document", "9"])
    with pytest.raises(BadInputError, match="--domain verse: is not in this data set; there are: law, prose"):
        main(["inspect", str(made), "--domain", "verse"])


def documents_of(folder: Path, split: str) -> list[list[int]]:
    return [
        shard.document(i).tolist()
        for shard in open_dataset(folder).split(split).shards
        for i in range(shard.document_ends.size)
    ]


def test_an_export_for_deepspeed_is_read_by_deepspeed(made: Path, tmp_path: Path) -> None:
    indexed = pytest.importorskip("deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset")
    assert main(["export", str(made), str(tmp_path / "out"), "--format", "deepspeed"]) == 0
    read = []
    for number in range(2):
        dataset = indexed.MMapIndexedDataset(str(tmp_path / "out" / f"train_0000{number}"), skip_warmup=True)
        read += [dataset[i].tolist() for i in range(len(dataset))]
    assert read == documents_of(made, "train")
    index = indexed.MMapIndexedDataset.Index(str(made / "train/shard_00000.idx"), skip_warmup=True)
    assert index.dtype is np.uint64, "the hazard is gone: DeepSpeed could read uint16 in place"


@pytest.mark.parametrize(("target", "dtype"), [("megatron", "<u2"), ("deepspeed", "<i4")])
def test_an_export_keeps_every_token_and_lists_what_it_wrote(
    made: Path, tmp_path: Path, target: str, dtype: str
) -> None:
    main(["export", str(made), str(tmp_path / "out"), "--format", target])
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    assert np.dtype(description["dtype"]) == np.dtype(dtype)
    for split in ("train", "validation"):
        paths = sorted((tmp_path / "out").glob(f"{split}_*.bin"))
        tokens = np.concatenate([np.fromfile(path, dtype) for path in paths])
        assert tokens.tolist() == [token for document in documents_of(made, split) for token in document]
    listed = {file["file"]: file["sha256"] for file in description["files"]}
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "out").iterdir()}
    del found["export.json"]
    assert listed == found


def test_an_export_for_datatrove_is_read_by_datatrove(made: Path, tmp_path: Path) -> None:
    from datatrove.utils.dataset import DatatroveFolderDataset

    main(["export", str(made), str(tmp_path / "out"), "--format", "datatrove"])
    read = DatatroveFolderDataset(str(tmp_path / "out" / "train"), seq_len=10, token_size=2, shuffle=False)
    shards = open_dataset(made).split("train").shards
    windows = [shard.tokens[11 * i : 11 * i + 11].tolist() for shard in shards for i in range(shard.tokens.size // 11)]
    assert [read[i]["input_ids"].tolist() for i in range(len(read))] == windows


def test_an_export_is_whole_or_absent(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_json_atomically", full)
        with pytest.raises(BadInputError, match="No space left on device"):
            main(["export", str(made), str(tmp_path / "out"), "--format", "megatron"])
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    main(["export", str(made), str(tmp_path / "out"), "--format", "megatron"])
    with pytest.raises(BadInputError, match="is there already"):
        main(["export", str(made), str(tmp_path / "out"), "--format", "megatron"])
