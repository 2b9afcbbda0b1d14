"""Documents to tokens: one shard for each piece of work, every document followed by its end token.

Texts go through the engine that was chosen for the tokenizer (``tokenizer/engine.py``). Every 256th document of a piece
is encoded by the reference as well: where the ids differ, the run stops, so an engine that is wrong on this corpus
cannot go unnoticed for long.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from data_pipeline.dataset.shards import DOCUMENT, UNKNOWN_ORIGIN, ShardWriter
from data_pipeline.execution.tally import CountDocuments
from data_pipeline.inputs.readers import DocumentReader, InputFile
from data_pipeline.tokenizer.engine import Encode, create_engine
from data_pipeline.tokenizer.interface import Tokenizer, load_tokenizer
from launch.settings import BadInputError

BATCH_CHARACTERS = 1 << 20
AUDIT_EVERY = 256


@functools.lru_cache(maxsize=1)
def _load(path: Path, end_id: int, engine: str) -> tuple[Tokenizer, Encode]:
    """Once a process and stage: a large vocabulary takes seconds to load, as long as a piece takes to encode."""
    tokenizer = load_tokenizer(path, end_id)
    return tokenizer, create_engine(engine, tokenizer)


class WriteTokens(PipelineStep):
    """Last step of a pipeline: this task's documents into the shard ``folder/RANK.bin``, also when there are none."""

    name = "Ice tokens"
    type = "🔢 - TOKENIZER"

    def __init__(self, folder: Path, tokenizer_path: Path, end_id: int, engine: str, domains: Sequence[str]) -> None:
        super().__init__()
        self.folder = folder
        self.tokenizer_path = tokenizer_path
        self.end_id = end_id
        self.engine = engine
        self.domain_ids = {domain: index for index, domain in enumerate(domains)}

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Write tokens, pass the documents on."""
        tokenizer, encode = _load(self.tokenizer_path, self.end_id, self.engine)
        end = np.asarray([tokenizer.end_id], dtype=np.uint32)
        number = 0
        with ShardWriter(self.folder / f"{rank:05d}.bin", tokenizer.vocab_size) as writer:
            for batch in _batches(data):
                parts: list[NDArray[Any]] = []
                records = []
                encoded = encode([document.text for document in batch])
                for document, ids in zip(batch, encoded, strict=True):
                    if number % AUDIT_EVERY == 0 and ids.tolist() != tokenizer.encode(document.text):
                        raise BadInputError(
                            f"document {document.id!r}: {self.engine} gives other token ids than "
                            f"{tokenizer.library}; run again with --set tokenizer.engine=reference"
                        )
                    number += 1
                    parts += (ids, end)
                    records.append(self._record(document))
                lengths = np.fromiter((ids.size + 1 for ids in parts[::2]), dtype=np.int64, count=len(batch))
                writer.append(np.concatenate(parts), lengths, np.asarray(records, dtype=DOCUMENT))
                yield from batch

    def _record(self, document: Document) -> tuple[int, int, int, int, int]:
        origin = document.metadata.get("origin")
        source, file, position = UNKNOWN_ORIGIN
        if origin is not None:
            source, file, position = origin["source"], origin["file"], origin["position"]
        return len(document.text.encode()), position, file, source, self.domain_ids[document.metadata["domain"]]


def _batches(documents: Any) -> Iterator[list[Document]]:
    """Documents in groups of about a megabyte, so that memory does not depend on how long they are."""
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def tokenise_pipeline(
    files: Sequence[InputFile],
    folder: Path,
    tallies: Path,
    tokenizer_path: Path,
    end_id: int,
    engine: str,
    domains: Sequence[str],
) -> list[PipelineStep]:
    """Documents of one split to ``folder/00000.bin``, ...; one task a file."""
    return [
        DocumentReader(files),
        CountDocuments(tallies),
        WriteTokens(folder, tokenizer_path, end_id, engine, domains),
    ]
