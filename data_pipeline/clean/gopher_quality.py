"""Gopher's quality rules (Rae et al. 2021, arXiv:2112.11446, table A1).

Decisions and reasons are those of datatrove's ``GopherQualityFilter`` given the same words (a test compares them). Word
counts, lengths and kinds come from arrays over the page's characters, so no word becomes a string, and rules about
lines look at single lines only when the document has enough of the marks to break them.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.clean.characters import ALPHABETIC, NOT_PUNCTUATION
from data_pipeline.clean.rules import Rule, over, under
from data_pipeline.clean.settings import GopherQualitySettings
from data_pipeline.clean.words import Page

BULLETS = ("\u2022", "-")
ELLIPSES = ("...", "\u2026")


def count_stop_words(page: Page, stop_words: tuple[str, ...], enough: int) -> int:
    """How many different ``stop_words`` are among the page's words, counted up to ``enough``."""
    found = 0
    for word in dict.fromkeys(stop_words):
        position = page.text.find(word)
        while position >= 0:
            index = int(np.searchsorted(page.starts, position))
            if index < page.n_words and page.starts[index] == position and page.ends[index] == position + len(word):
                found += 1
                break
            position = page.text.find(word, position + 1)
        if found >= enough:
            break
    return found


def _mostly_bulleted(text: str, lines: list[str], limit: float | None) -> bool:
    if limit is None or sum(map(text.count, BULLETS)) <= limit * len(lines):
        return False
    return sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines) > limit


def _mostly_cut_off(text: str, lines: list[str], limit: float | None) -> bool:
    if limit is None or sum(map(text.count, ELLIPSES)) <= limit * len(lines):
        return False
    return sum(line.rstrip().endswith(ELLIPSES) for line in lines) / len(lines) > limit


def gopher_quality_rule(settings: GopherQualitySettings) -> Rule:
    """The rules in datatrove's order; ``gopher_short_doc`` for a page without words."""

    def rule(page: Page) -> str | None:
        text, n_words = page.text, page.n_words
        if not n_words:
            return "gopher_short_doc"
        # Between words there is white space only, which has neither bit: each word's bits reach up to the next word.
        bits = np.bitwise_or.reduceat(page.bits, page.starts)
        spoken = (bits & NOT_PUNCTUATION) != 0
        n_spoken = int(np.count_nonzero(spoken))
        if not n_spoken or under(n_spoken, settings.min_words):
            return "gopher_short_doc"
        if over(n_spoken, settings.max_words):
            return "gopher_long_doc"
        mean_length = int((page.ends - page.starts)[spoken].sum()) / n_spoken
        if under(mean_length, settings.min_mean_word_length):
            return "gopher_below_avg_threshold"
        if over(mean_length, settings.max_mean_word_length):
            return "gopher_above_avg_threshold"
        if over(text.count("#") / n_words, settings.max_symbols_per_word):
            return "gopher_too_many_hashes"
        if over(sum(map(text.count, ELLIPSES)) / n_words, settings.max_symbols_per_word):
            return "gopher_too_many_ellipsis"
        lines = text.splitlines()
        if _mostly_bulleted(text, lines, settings.max_bullet_lines):
            return "gopher_too_many_bullets"
        if _mostly_cut_off(text, lines, settings.max_ellipsis_lines):
            return "gopher_too_many_end_ellipsis"
        if under(np.count_nonzero(bits & ALPHABETIC) / n_words, settings.min_alphabetic_words):
            return "gopher_below_alpha_threshold"
        wanted = settings.min_stop_words
        if wanted is not None and count_stop_words(page, settings.stop_words, wanted) < wanted:
            return "gopher_enough_stop_words"
        return None

    return rule
