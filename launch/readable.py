"""Large numbers as people read them."""

from __future__ import annotations


def readable(number: float) -> str:
    """Three digits and a unit: 1880065 is 1.88M."""
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:g}"
