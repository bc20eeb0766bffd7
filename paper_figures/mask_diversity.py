"""Figure (a): the paper's table of mask diversity for T = 64 and T = 256, its formula against exact counts."""

from __future__ import annotations

import math
from typing import Any

from _figure import BLUE, GREY, VERMILION, arguments, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from masksolve import Pattern
from masksolve.diversity import mask_diversity
from masksolve.diversity._paper_formula import paper_formula

CONSTRAINTS = [
    (Pattern(1, 2), "unstructured"),
    (Pattern(8, 16), "rows"),
    (Pattern(4, 8), "rows"),
    (Pattern(8, 16), "both"),
    (Pattern(2, 4), "rows"),
    (Pattern(4, 8), "both"),
    (Pattern(2, 4), "both"),
]
NAMES = {"unstructured": "unstructured", "rows": "one-sided", "both": "transposable"}


def rows() -> list[dict[str, Any]]:
    """One row a tensor size and constraint; exact integers throughout."""
    found = []
    for size in (64, 256):
        for pattern, direction in CONSTRAINTS:
            if direction == "both" and size % pattern.m**2:
                continue
            exact = mask_diversity(pattern, size, direction=direction)
            # The paper's other formulas are exact.
            paper = paper_formula(pattern.n, pattern.m) ** (size // pattern.m**2) if direction == "both" else exact
            found.append(
                {
                    "T": size,
                    "constraint": NAMES[direction] + ("" if direction == "unstructured" else f" {pattern}"),
                    "paper's formula": paper,
                    "exact": exact,
                    "formula / exact": paper / exact,
                }
            )
    return found


def draw(axes: Axes, size: int, found: list[dict[str, Any]]) -> None:
    """Two bars a constraint, on a scale of log10."""
    shown = [row for row in found if row["T"] == size][::-1]
    for at, row in enumerate(shown):
        exact, paper = math.log10(row["exact"]), math.log10(row["paper's formula"])
        axes.barh(at - 0.2, exact, 0.38, color=BLUE)
        axes.barh(at + 0.2, paper, 0.38, color=VERMILION if paper != exact else GREY)
        for height, value in ((-0.2, row["exact"]), (0.2, row["paper's formula"])):
            axes.text(math.log10(value), at + height, f" {value:.1e}".replace("e+", "e"), va="center", fontsize=11)
    axes.set_yticks(range(len(shown)), [row["constraint"] for row in shown])
    axes.set_xlim(0, 1.25 * math.log10(max(row["exact"] for row in shown)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"T = {size} weights, half of them kept")
    axes.set_xlabel("masks allowed, log10")
    axes.grid(visible=False, axis="y")


def main() -> None:
    """Draw and save."""
    options = arguments(__doc__)
    found = rows()
    figure = Figure(figsize=(11, 9))
    top, bottom = figure.subplots(2, 1, height_ratios=[5, 7])
    draw(top, 64, found)
    draw(bottom, 256, found)
    for color, label in (
        (VERMILION, "paper's formula, wrong"),
        (GREY, "paper's formula, equal to the count"),
        (BLUE, "exact count"),
    ):
        top.barh([0], [0], color=color, label=label)
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle("Counted exactly, transposable 4:8 allows fewer masks than one-sided 2:4, not more", fontsize=15)
    integers = ("paper's formula", "exact")
    table = [{key: f"{value:.2e}" if key in integers else value for key, value in row.items()} for row in found]
    save(figure, found, "mask_diversity", options.into, table)


if __name__ == "__main__":
    main()
