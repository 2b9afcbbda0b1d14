"""First step of the first pipeline: the raw documents of one piece, bad records put aside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.inputs.formats import READERS
from data_pipeline.inputs.parts import BadRecord
from data_pipeline.inputs.plan import read_piece
from data_pipeline.inputs.quarantine import Quarantine
from data_pipeline.inputs.streams import open_part


class PieceReader(PipelineStep):
    """Yields the documents of piece ``rank`` of a plan; a pipeline that begins with it runs one task a piece.

    Args:
        plan: The file that ``plan.write_pieces`` wrote.
        folder: The stage's folder, for the quarantine and the counts.
        max_document_bytes: The largest record to load.
    """

    name = "Ice inputs"
    type = "📖 - READER"

    def __init__(self, plan: Path, folder: Path, max_document_bytes: int) -> None:
        super().__init__()
        self.plan = plan
        self.folder = folder
        self.max_document_bytes = max_document_bytes

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the piece's documents, in order."""
        with Quarantine(self.folder, rank) as quarantine:
            for part in read_piece(self.plan, rank):
                read = passed_over = 0
                with open_part(part) as stored:
                    for found in READERS[part.format](part, stored, self.max_document_bytes):
                        if found is None:
                            passed_over += 1
                        elif isinstance(found, BadRecord):
                            quarantine.put(part, found)
                        else:
                            read += 1
                            yield found
                quarantine.count(part, "parts", 1)
                quarantine.count(part, "read", read)
                quarantine.count(part, "passed_over", passed_over)
