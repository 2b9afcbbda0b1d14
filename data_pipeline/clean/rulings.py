"""What is drawn rather than written: underlines of headings, borders of tables, leaders of dots.

Reference text is full of it (``=====``, ``+-----+-----+``, ``| . . . . 5``), and since every mark is a word to Gopher's
rules, a page with two tables looks like a page that repeats itself: a fifth of the kernel's documentation went for that
reason alone. For judging, and only for that, lines without a letter or digit are left out, and a run of one mark counts
once. A page that is hardly anything else is judged as it is.

Cost: two passes of a regular expression, about 100 MB/s a core together.
"""

from __future__ import annotations

import re

# Without a word character there is nothing that could be read.
_RULED_LINE = re.compile(r"^[^\w\n]+(?:\n|\Z)", re.MULTILINE)
_RUN = re.compile(r"([^\w\s])\1{2,}")
LEAST_LEFT = 0.25


def without_rulings(text: str) -> str:
    """``text`` as rules should see it; ``text`` itself when less than a quarter of it would be left."""
    written = _RUN.sub(r"\1", _RULED_LINE.sub("", text))
    return written if len(written) >= LEAST_LEFT * len(text) else text
