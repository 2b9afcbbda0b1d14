"""Cleaning: Unicode and whitespace are mended, then documents that are too short, too odd or too repetitive go.

The quality rules are Gopher's (Rae et al. 2021, arXiv:2112.11446, table A1) as datatrove implements them, with
thresholds from the settings. Each drop has a name, such as ``too_short`` or ``gopher_enough_stop_words``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters.base import BaseFormatter

from data_pipeline.clean.words import FastWords
from data_pipeline.config import CleanSettings, QualitySettings
from data_pipeline.execution.tally import CountDocuments, DocumentWriter, DroppedWriter
from data_pipeline.inputs.readers import DocumentReader, InputFile

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_ODD_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# C0 and C1 controls but for tab and newline; soft hyphen, zero-width space, word joiner, byte order mark. Zero-width
# (non-)joiners stay: scripts and emoji are spelled with them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]")
_TRAILING_SPACE = re.compile(r"[ \t]+(?=\n|$)")
_INNER_SPACES = re.compile(r"(?<=\S) {2,}(?=\S)")
_BLANK_LINES = re.compile(r"\n{3,}")


class NormaliseText(BaseFormatter):
    """Mends encoding errors, composes Unicode, removes invisible characters and superfluous whitespace."""

    name = "Ice normalise"

    def __init__(self, settings: CleanSettings) -> None:
        super().__init__()
        self.settings = settings

    def format(self, text: str) -> str:
        """The cleaned text; cleaning it again changes nothing."""
        if self.settings.fix_encoding and not text.isascii():
            text = _mend_encoding(text)
        text = _LINE_ENDS.sub("\n", text)
        text = _INVISIBLE.sub("", text)
        if self.settings.unicode_form:
            text = unicodedata.normalize(self.settings.unicode_form, text)
        text = _ODD_SPACES.sub(" ", text)
        text = _TRAILING_SPACE.sub("", text)
        if self.settings.collapse_spaces:
            text = _INNER_SPACES.sub(" ", text)
        return _BLANK_LINES.sub("\n\n", text).strip()


def _mend_encoding(text: str) -> str:
    """Undo mis-decoded UTF-8 ("Ã©" for "é"); quotes, ligatures, HTML entities and widths stay as the author wrote."""
    import ftfy

    return ftfy.fix_text(
        text,
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        normalization=None,
    )


class LengthFilter(BaseFilter):
    """Keeps documents between two lengths; the first filter, being cheap, and since later ones divide by length."""

    name = "Ice length"

    def __init__(self, settings: QualitySettings, exclusion_writer: DroppedWriter) -> None:
        super().__init__(exclusion_writer)
        self.settings = settings

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True to keep; otherwise ``empty``, ``too_short`` or ``too_long``."""
        if not doc.text:
            return False, "empty"
        if len(doc.text) < self.settings.min_characters:
            return False, "too_short"
        if len(doc.text) > self.settings.max_characters:
            return False, "too_long"
        return True


def clean_pipeline(
    files: Sequence[InputFile], clean: CleanSettings, quality: QualitySettings, folder: Path
) -> list[PipelineStep]:
    """Raw documents to clean ones in ``folder/documents``; one task a file."""
    words = FastWords()

    def dropped(step: str) -> DroppedWriter:
        return DroppedWriter(folder / "dropped" / step, folder / "tallies" / f"dropped_{step}")

    return [
        DocumentReader(files),
        CountDocuments(folder / "tallies" / "read"),
        NormaliseText(clean),
        LengthFilter(quality, dropped("length")),
        GopherQualityFilter(
            min_doc_words=quality.min_words,
            max_doc_words=None,
            min_avg_word_length=quality.min_mean_word_length,
            max_avg_word_length=quality.max_mean_word_length,
            max_symbol_word_ratio=quality.max_symbol_ratio,
            max_non_alpha_words_ratio=quality.min_alphabetic_words,
            min_stop_words=quality.min_stop_words,
            exclusion_writer=dropped("quality"),
            language=words,
        ),
        GopherRepetitionFilter(
            dup_line_frac=quality.max_duplicate_line_fraction,
            dup_para_frac=None,
            dup_line_char_frac=quality.max_duplicate_line_characters,
            dup_para_char_frac=None,
            top_n_grams=quality.top_ngrams,
            dup_n_grams=quality.duplicate_ngrams,
            exclusion_writer=dropped("repetition"),
            language=words,
        ),
        CountDocuments(folder / "tallies" / "kept"),
        DocumentWriter(folder / "documents"),
    ]
