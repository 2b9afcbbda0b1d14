"""What each character is, as bits in one table, so that rules about characters become look-ups over an array.

A text becomes an array of code points (1 byte each when it is ASCII, else 4), and ``class_bits(codes)`` the bits of
each. The table of the first 65,536 characters takes 30 ms to build, that of all 1.1 million half a second; the second
is built when a text first needs it.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np
from datatrove.utils.text import PUNCTUATION_SET
from numpy.typing import NDArray

WORD = 1  # letters, digits, the underscore and combining marks
SPACE = 2
JOINER = 4  # belongs to a word when it stands between two WORD characters
ALPHABETIC = 8
# Visible, and not in datatrove's set of punctuation: a word without any such character is a symbol to Gopher's rules.
NOT_PUNCTUATION = 16

# Apostrophes, hyphen; zero-width non-joiner and joiner, with which some scripts are spelled.
JOINERS = "'\u2019-\u200c\u200d"
# Scripts written without spaces, whose characters are words of their own: Han and Hiragana. Katakana, Thai, Lao, Khmer
# and Burmese, where single characters mean nothing, stay in runs, since dividing them takes a dictionary.
SINGLE = ((0x3041, 0x3096), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))

_BASIC = 0x10000
_ALL = 0x110000


def _bits(code: int) -> int:
    character = chr(code)
    single = any(first <= code <= last for first, last in SINGLE)
    word = character.isalnum() or character == "_" or unicodedata.category(character)[0] == "M"
    return (
        WORD * (word and not single)
        | SPACE * character.isspace()
        | JOINER * (character in JOINERS)
        | ALPHABETIC * character.isalpha()
        | NOT_PUNCTUATION * (character not in PUNCTUATION_SET and not character.isspace())
    )


@functools.cache
def _table(size: int) -> NDArray[np.uint8]:
    return np.fromiter(map(_bits, range(size)), dtype=np.uint8, count=size)


def code_points(text: str) -> NDArray[np.uint8] | NDArray[np.uint32]:
    """The characters of ``text`` as numbers: uint8 (n,) when it is ASCII, else uint32 (n,)."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def class_bits(codes: NDArray[np.uint8] | NDArray[np.uint32]) -> NDArray[np.uint8]:
    """The bits of each character; uint8 (n,)."""
    size = _BASIC if codes.dtype == np.uint8 or not codes.size or codes.max() < _BASIC else _ALL
    return _table(size)[codes]
