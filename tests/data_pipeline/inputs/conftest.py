"""Sources made by hand, planned and read as a run would, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document

from data_pipeline.config import InputSettings, SourceSettings
from data_pipeline.inputs.file_tables import FileTable, find_files
from data_pipeline.inputs.piece_reader import PieceReader
from data_pipeline.inputs.plan import Piece, plan_pieces, write_pieces
from data_pipeline.inputs.quarantine import check_quarantine, quarantined


@dataclass(frozen=True)
class Reading:
    """Everything that reading some sources gave."""

    folder: Path
    tables: Sequence[FileTable]
    pieces: Sequence[Piece]
    settings: InputSettings
    documents: Sequence[Document]

    @property
    def texts(self) -> list[str]:
        """The documents' texts, in order."""
        return [document.text for document in self.documents]

    @property
    def bad(self) -> list[dict[str, Any]]:
        """What was put aside, in order."""
        return list(quarantined(self.folder))

    @property
    def reasons(self) -> list[str]:
        """Why records were put aside, in order."""
        return [record["reason"] for record in self.bad]

    def check(self) -> None:
        """Judge the whole input."""
        check_quarantine(self.folder, self.tables, self.settings)


def read_sources(folder: Path, sources: Sequence[dict[str, Any] | str | Path], **settings: Any) -> Reading:
    """Find, plan and read ``sources`` (settings, or just paths); what is put aside goes to ``folder``."""
    dictionaries = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    input_settings = InputSettings(**settings)
    tables = find_files([SourceSettings.model_validate(source) for source in dictionaries], input_settings)
    pieces = plan_pieces(tables, input_settings)
    plan = folder / "scratch" / "pieces.jsonl"
    write_pieces(pieces, plan)
    reader = PieceReader(plan, folder, input_settings.max_document_bytes)
    documents = [document for rank in range(len(pieces)) for document in reader.run(None, rank, len(pieces))]
    return Reading(folder, tables, pieces, input_settings, documents)


@pytest.fixture(scope="session")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reading]:
    """Call ``read(source, ..., setting=value)``; each call has a folder of its own."""
    return lambda *sources, **settings: read_sources(tmp_path_factory.mktemp("stage"), sources, **settings)
