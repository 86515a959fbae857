"""What is said to people: times, and names of others."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def operations(number: float) -> str:
    """Operations for people: 0.607 PFLOP, 3.2 TFLOP."""
    return f"{number / 1e15:.3f} PFLOP" if number >= 1e14 else f"{number / 1e12:.3g} TFLOP"


def printable(line: str) -> str:
    """`line` for a terminal: names and settings of others may hold line breaks, escapes, and bytes that are no text."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
