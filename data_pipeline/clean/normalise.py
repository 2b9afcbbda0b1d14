"""Unicode and whitespace: what was mis-decoded or is invisible is mended; what the author wrote stays.

Most lines need nothing. So each step first asks, in one fast pass, whether there is anything for it to do: a text that
is printable but for tabs and newlines holds no invisible character and no odd space, and ftfy sees only lines that look
mis-decoded by its own test. A test compares the result with every step done on all of the text.
"""

from __future__ import annotations

import re
import unicodedata

from data_pipeline.clean.settings import NormaliseSettings

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_ODD_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# C0 and C1 controls but for tab and newline; soft hyphen, zero-width space, word joiner, byte order mark. Zero-width
# (non-)joiners stay: scripts and emoji are spelled with them.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff]")
# Looking back keeps the time linear: a run of spaces is tried once, not from each of its spaces.
_TRAILING_SPACE = re.compile(r"(?<![ \t])[ \t]+(?=\n|$)")
_INNER_SPACES = re.compile(r"(?<=\S) {2,}(?=\S)")
_BLANK_LINES = re.compile(r"\n{3,}")
_LEADING_BLANK_LINES = re.compile(r"^(?:[ \t]*\n)+")
_SEGMENTS = re.compile(r"[^\n]*\n|[^\n]+")
# What ftfy mends in any line, mis-decoded or not: terminal escapes, and controls that it removes.
_FOR_FTFY = re.compile("[\x1b\x80-\x9f\u206a-\u206f\ufff9-\ufffc]")


def normalise(text: str, settings: NormaliseSettings) -> str:
    """The normal form of ``text``; normalising it again changes nothing (where ftfy's own mending does not)."""
    if settings.fix_encoding and not (text.isascii() and "\x1b" not in text):
        text = text.replace("\x0b", "\n")  # a line end, which ftfy would remove as a control
        text = "".join([_mend_encoding(line) for line in _SEGMENTS.findall(text)])
    if not text.replace("\n", "").replace("\t", "").isprintable():
        text = _ODD_SPACES.sub(" ", _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text)))
    if settings.unicode_form and not text.isascii():
        text = _ODD_SPACES.sub(" ", unicodedata.normalize(settings.unicode_form, text))
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = _TRAILING_SPACE.sub("", text)
    if settings.collapse_spaces:
        if "  " in text:
            text = _INNER_SPACES.sub(" ", text)
    else:
        # Leading spaces are the first line's indentation.
        text = _LEADING_BLANK_LINES.sub("", text)
    if "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip() if settings.collapse_spaces else text.rstrip()


def _mend_encoding(line: str) -> str:
    """Undo mis-decoded UTF-8 ("Ã©" for "é"); quotes, ligatures, HTML entities and widths stay as the author wrote."""
    if line.isascii() and "\x1b" not in line:
        return line
    import ftfy
    from ftfy.badness import is_bad

    if not is_bad(line) and not _FOR_FTFY.search(line):
        return line
    return ftfy.fix_text(
        line,
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        normalization=None,
    )
