"""C4's rules (Raffel et al. 2020, section 2.2), which edit a page before they judge it: boilerplate lines go.

The text that stays, decisions and reasons are those of datatrove's ``C4QualityFilter`` given the same sentences. Its
list of bad words is not used: it would have to be downloaded. Sentences are counted only until there are enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from data_pipeline.clean.settings import C4Settings
from data_pipeline.clean.words import split_into_sentences

CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
TERMINAL_PUNCTUATION = (".", "?", "!", '"', "'")
ELLIPSIS = "..."
POLICY_PHRASES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def c4_editor(settings: C4Settings) -> Callable[[str], tuple[str, str | None]]:
    """A function from a text to the text that stays, and the reason to drop the document or None."""
    longest, fewest = settings.max_word_characters, settings.min_words_per_line
    enough = settings.min_sentences or 0

    def edit(text: str) -> tuple[str, str | None]:
        sentences, kept = 0, []
        has_citations = settings.remove_citations and "[" in text
        for raw in text.splitlines():
            line = raw.strip()
            words = line.split(None, fewest) if fewest else []
            if longest and len(line) > longest and max(map(len, line.split())) > longest:
                continue
            if has_citations:
                line = CITATION.sub("", line)
            if settings.terminal_punctuation and (not line.endswith(TERMINAL_PUNCTUATION) or line.endswith(ELLIPSIS)):
                continue
            if fewest and len(words) < fewest:
                continue
            lower = line.lower()
            if settings.drop_lorem_ipsum and "lorem ipsum" in lower:
                return text, "lorem_ipsum"
            if settings.remove_javascript_lines and "javascript" in lower:
                continue
            if settings.drop_curly_brackets and "{" in line:
                return text, "curly_bracket"
            if settings.remove_policy_lines and any(phrase in lower for phrase in POLICY_PHRASES):
                continue
            if sentences < enough:
                sentences += len(split_into_sentences(line))
            kept.append(line)
        if sentences < enough:
            return text, "too_few_sentences"
        return "\n".join(kept).strip(), None

    return edit
