"""Words that all reports share."""

from __future__ import annotations


def one_sided(direction: str) -> str:
    """Return the words that follow a pattern of one-sided masks; none for transposable ones, which are the rule."""
    return "" if direction == "both" else f" along {direction} only"


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: "1 tensor", "2 tensors"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
