"""Sentences from plain files: one per line, or separated by lines with nothing but %, as Debian's fortunes are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DEBIAN = Path("/usr/share/games/fortunes")
# To calibrate on, and to evaluate on: other authors, other subjects.
CALIBRATION = tuple(DEBIAN / name for name in ("people", "science", "wisdom"))
EVALUATION = tuple(DEBIAN / name for name in ("literature", "computers"))


def sentences(files: Sequence[Path], number: int, seed: int = 0) -> list[str]:
    """So many different ones of 40 to 300 letters, drawn at random."""
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not found; apt-get install fortunes, or give --calibration FILES --evaluation FILES"
        )
    found = dict.fromkeys(
        piece
        for path in files
        for part in re.split(r"^%$", path.read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)
        for piece in _pieces(part)
        if 40 <= len(piece) <= 300
    )
    if len(found) < number:
        raise SystemExit(f"{', '.join(map(str, files))} hold {len(found)} sentences of 40 to 300 letters, not {number}")
    order = np.random.default_rng(seed).permutation(len(found))
    every = list(found)
    return [every[index] for index in order[:number]]


def _pieces(part: str) -> list[str]:
    """Return the sentences of a paragraph, without line breaks and the author's name."""
    body = part.split("\n\t\t--")[0]
    return re.split(r"(?<=[.!?])\s+", " ".join(body.split()))
