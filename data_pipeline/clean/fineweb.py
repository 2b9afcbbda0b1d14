"""FineWeb's quality rules (Penedo et al. 2024, arXiv:2406.17557, section 3.6): lists, menus and pages of short lines.

Decisions and reasons are those of datatrove's ``FineWebQualityFilter`` given the same words.
"""

from __future__ import annotations

from datatrove.utils.text import TERMINAL_PUNCTUATION

from data_pipeline.clean.rules import Rule, count_duplicates
from data_pipeline.clean.settings import FineWebSettings
from data_pipeline.clean.words import Page


def fineweb_rule(settings: FineWebSettings) -> Rule:
    """The rules in datatrove's order; ``empty`` for a page without a visible line."""
    short = settings.short_line_characters

    def rule(page: Page) -> str | None:
        lines, text = page.lines, page.text
        if not lines:
            return "empty"
        if sum(line[-1] in TERMINAL_PUNCTUATION for line in lines) / len(lines) < settings.min_punctuated_lines:
            return "line_punct_ratio"
        if sum(len(line) <= short for line in lines) / len(lines) > settings.max_short_lines:
            return "short_line_ratio"
        newlines = text.count("\n")
        if count_duplicates(lines)[1] / (len(text) - newlines) > settings.max_duplicate_line_characters:
            return "char_dup_ratio"
        if newlines / page.n_words > settings.max_newlines_per_word:
            return "list_ratio"
        return None

    return rule
