"""A copy of a data set for another program: Megatron, DeepSpeed or datatrove.

=============  =====================================================================================================
``megatron``   ``SPLIT_00000.bin`` and ``.idx``: uint16 tokens stay uint16 (code 8), larger vocabularies are int32
``deepspeed``  the same, always int32 (code 4), which Megatron reads too: DeepSpeed takes code 8 for uint64 and would
               return garbage with no error
``datatrove``  ``SPLIT/00000_shard.ds`` and ``.ds.index``, for ``DatatroveFolderDataset``
=============  =====================================================================================================

Files are written under a temporary folder that gets its name at the end, so an export is whole or absent. Its
``export.json`` lists each file with size and hash, the tokenizer's hash and the fingerprint of the data set.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dataset import megatron
from data_pipeline.dataset.reader import Dataset
from data_pipeline.dataset.shards import COPY_TOKENS, HashedFile, Shard
from data_pipeline.disk_full import unwritable
from launch.files import fsync_path, write_json_atomically
from launch.settings import BadInputError

EXPORT_NAME = "export.json"


def export_dataset(dataset: Dataset, folder: Path, target: str) -> dict[str, Any]:
    """Write ``dataset`` into the new ``folder`` for the program ``target``; returns what ``export.json`` says.

    Raises ``BadInputError`` when ``folder`` exists or there is no room; then nothing is left behind.
    """
    if folder.exists():
        raise BadInputError(f"{folder}: is there already; export into a new folder")
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        try:
            partial.mkdir(parents=True)
            description = _write(dataset, partial, target)
            write_json_atomically(partial / EXPORT_NAME, description)
            partial.rename(folder)
        except OSError as error:
            raise unwritable(folder, error) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_path(folder.parent)
    return description


def _write(dataset: Dataset, folder: Path, target: str) -> dict[str, Any]:
    dtype = np.dtype("<i4") if target == "deepspeed" else np.dtype(dataset.manifest.dtype)
    files = []
    for split, stream in dataset.streams.items():
        for number, shard in enumerate(stream.shards):
            if target == "datatrove":
                stem = f"{split}/{number:05d}_shard.ds"
                files.append(_copy(folder, stem, (chunk.tobytes() for chunk in _token_chunks(shard, dtype))))
                files.append(_copy(folder, f"{stem}.index", [shard.document_ends.tobytes()]))
            else:
                stem = f"{split}_{number:05d}"
                files.append(_copy(folder, f"{stem}.bin", (chunk.tobytes() for chunk in _token_chunks(shard, dtype))))
                name = "uint16" if dtype == np.uint16 else "uint32"  # int32 and uint32 share a code: see megatron.py
                files.append(_copy(folder, f"{stem}.idx", megatron.index_chunks(shard.document_ends, name)))
    tokenizer = dataset.manifest.tokenizer
    path = dataset.folder / tokenizer.file
    files.append(_copy(folder, path.name, [path.read_bytes()]))
    return {
        "format": target,
        "dtype": dtype.name if target != "megatron" or dtype == np.uint16 else "int32",
        "vocab_size": dataset.vocab_size,
        "end_token_id": dataset.manifest.end_token_id,
        "tokenizer_sha256": tokenizer.sha256,
        "fingerprint": dataset.fingerprint,
        "splits": {name: split.total.model_dump() for name, split in dataset.manifest.splits().items()},
        "files": files,
    }


def _token_chunks(shard: Shard, dtype: np.dtype[Any]) -> Iterator[np.ndarray[Any, Any]]:
    for start in range(0, shard.tokens.size, COPY_TOKENS):
        yield shard.tokens[start : start + COPY_TOKENS].astype(dtype)


def _copy(folder: Path, name: str, chunks: Any) -> dict[str, Any]:
    file = HashedFile(folder / name)
    for chunk in chunks:
        file.write(chunk)
    entry = file.close()
    fsync_path(file.path)
    return {**entry, "file": name}
