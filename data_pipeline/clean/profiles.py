"""Profiles: values for all parts of cleaning at once, for four kinds of text.

Rules of thumb for web pages do not hold elsewhere: at their thresholds 99% of the Linux kernel's documentation and of
Perl's goes, since reference text has short lines, tables, underlines and few full stops. What each profile is for:

=============  =====================================================================================================
web            pages from a crawl: all of Gopher's, C4's and FineWeb's rules at their published thresholds, in English
documentation  manuals, reference text, encyclopaedias: layout is kept, tables and code in between, any language
code           source files: layout is kept, English is not asked, only degenerate files go
books          chapters, verse, plays: prose throughout, but long documents, short lines, refrains
=============  =====================================================================================================

A part that is not named has its own defaults (settings.py); None switches it off. ``docs/data.md`` has what each keeps
and drops on measured text.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

ProfileName = Literal["web", "documentation", "code", "books"]

PROFILES: MappingProxyType[str, dict[str, dict[str, Any] | bool | None]] = MappingProxyType(
    {
        "web": {
            "language": {},
            "gopher_repetition": {},
            "gopher_quality": {},
            # As FineWeb used C4's rules: lines without a full stop stay, since headings and lists are text too.
            "c4": {"terminal_punctuation": False},
            "fineweb": {},
        },
        "documentation": {
            # Columns mean something: tables and examples are aligned with spaces.
            "normalise": {"collapse_spaces": False},
            "ignore_rulings": True,
            # Tables, option lists and "Found in file" lines repeat; what repeats for half its length is a list of one.
            "gopher_repetition": {
                "max_duplicate_paragraphs": None,
                "max_duplicate_paragraph_characters": None,
                "max_duplicate_lines": 0.5,
                "max_duplicate_line_characters": 0.4,
                "top_ngrams": [[4, 0.5]],
                "duplicate_ngrams": [[5, 0.5]],
            },
            # Language is not asked, so neither are English stop words, nor the length of words: Han characters are a
            # word each. Names such as rfc6458_sctp_sendmsg are words of the trade.
            "gopher_quality": {
                "min_words": 40,
                "max_words": None,
                "min_mean_word_length": None,
                "max_mean_word_length": 14.0,
                "max_bullet_lines": None,
                "min_alphabetic_words": 0.35,
                "min_stop_words": None,
            },
        },
        "code": {
            "ignore_rulings": True,
            "normalise": {"fix_encoding": False, "unicode_form": None, "collapse_spaces": False},
            "length": {"min_characters": 100, "max_characters": 500_000},
            "gopher_repetition": {
                "max_duplicate_paragraphs": None,
                "max_duplicate_paragraph_characters": 0.5,
                "max_duplicate_lines": 0.7,
                "max_duplicate_line_characters": 0.5,
                "top_ngrams": [[4, 0.4]],
                "duplicate_ngrams": [[10, 0.6]],
            },
            "gopher_quality": {
                "min_words": 20,
                "max_words": None,
                "min_mean_word_length": 2.0,
                "max_mean_word_length": 20.0,
                "max_symbols_per_word": None,
                "max_bullet_lines": None,
                "max_ellipsis_lines": None,
                "min_alphabetic_words": 0.2,
                "min_stop_words": None,
            },
        },
        "books": {
            "length": {"min_characters": 200, "max_characters": 5_000_000},
            "gopher_repetition": {
                "max_duplicate_paragraphs": None,
                "max_duplicate_paragraph_characters": None,
                "max_duplicate_lines": 0.5,
                "top_ngrams": [[4, 0.16]],
                "duplicate_ngrams": [[5, 0.3]],
            },
            "gopher_quality": {"min_words": 40, "max_words": None, "min_alphabetic_words": 0.6},
        },
    }
)
