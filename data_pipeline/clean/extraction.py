"""HTML to text: resiliparse (8.5 MB of HTML a second and core), or trafilatura (0.4, more careful about boilerplate).

**No time limits.** datatrove runs extractors in a second process with a limit of 0.1 to 1 s by the clock: on a busy
machine more documents go, so the corpus depends on the load. Here the size of the HTML bounds the work, and the same
HTML gives the same text everywhere. Trafilatura's option to leave out what it has seen before is off: it depends on the
order of documents.

A page that cannot be parsed, or has no text, is a drop with a name, never the end of the run.
"""

from __future__ import annotations

import re

from data_pipeline.clean.settings import ExtractionSettings

HTML = "text/html"
# Browsers stop nesting at 512. Finding the main content takes time quadratic in the depth: 100,000 would take minutes.
MAX_DEPTH = 512


def _with_resiliparse(html: str, main_content: bool) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(html, preserve_formatting=True, main_content=main_content, alt_texts=False)


def _with_trafilatura(html: str, main_content: bool) -> str:
    from trafilatura import extract, html2txt  # type: ignore[import-untyped]

    if not main_content:
        return html2txt(html) or ""
    return extract(html, favor_precision=True, include_comments=False, deduplicate=False) or ""


# A tag that goes one deeper, or back up; elements without content do neither.
_TAG = re.compile(
    r"<(/?)(?!(?:area|base|br|col|embed|hr|img|input|link|meta|source|track|wbr)\b)[a-zA-Z]", re.IGNORECASE
)


def _may_be_deep(html: str) -> bool:
    """False only for elements nested at most ``MAX_DEPTH`` deep; elements that are never closed count as nested."""
    depth = 0
    if html.count("<") > MAX_DEPTH:
        for match in _TAG.finditer(html):
            depth = max(0, depth - 1) if match.group(1) else depth + 1
            if depth > MAX_DEPTH:
                return True
    return False


def _is_deep(html: str) -> bool:
    """Whether the parsed page has elements nested more than ``MAX_DEPTH`` deep."""
    from resiliparse.parse.html import HTMLTree, Node

    node: Node | None = HTMLTree.parse(html).document
    depth = 0
    while node is not None:
        if node.first_child is not None:
            node, depth = node.first_child, depth + 1
            if depth > MAX_DEPTH:
                return True
            continue
        while node is not None and node.next is None:
            node, depth = node.parent, depth - 1
        node = node and node.next
    return False


EXTRACTORS = {"resiliparse": _with_resiliparse, "trafilatura": _with_trafilatura}


def extract_text(html: str, settings: ExtractionSettings) -> tuple[str, str | None]:
    """The text of ``html`` and None, or ``html`` itself and the reason why there is none.

    Reasons: ``html_too_large``, ``html_too_deep`` (elements in elements), ``extraction_failed`` (the parser gave up),
    ``extraction_empty``.
    """
    if len(html) > settings.max_html_characters:
        return html, "html_too_large"
    try:
        if _may_be_deep(html) and _is_deep(html):
            return html, "html_too_deep"
        text = EXTRACTORS[settings.extractor](html, settings.main_content)
    except ImportError:
        raise
    except Exception:  # parsers raise what they like about other people's HTML, from ValueError to RecursionError
        return html, "extraction_failed"
    return (text, None) if text.strip() else (html, "extraction_empty")
