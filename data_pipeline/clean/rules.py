"""What all rules share: a rule looks at a page and gives the name of the reason to drop it, or None to keep it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_pipeline.clean.settings import LengthSettings
from data_pipeline.clean.words import Page

Rule = Callable[[Page], str | None]


def over(value: float, limit: float | None) -> bool:
    """Whether ``value`` is above ``limit``; None is no limit."""
    return limit is not None and value > limit


def under(value: float, limit: float | None) -> bool:
    """Whether ``value`` is below ``limit``; None is no limit."""
    return limit is not None and value < limit


def count_duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many of ``parts`` have come before, and how many characters those have together."""
    distinct = set(parts)
    if len(distinct) == len(parts):
        return 0, 0
    return len(parts) - len(distinct), sum(map(len, parts)) - sum(map(len, distinct))


def length_rule(settings: LengthSettings) -> Rule:
    """``empty``, ``too_short`` or ``too_long``: the first rule, being cheap, and since later ones divide by length."""

    def rule(page: Page) -> str | None:
        if not page.text:
            return "empty"
        if len(page.text) < settings.min_characters:
            return "too_short"
        return "too_long" if len(page.text) > settings.max_characters else None

    return rule
