"""Figure (b): bits per weight against M, one-sided and transposable, with the unstructured limit as the ceiling."""

from __future__ import annotations

import math
from typing import Any

from _figure import BLACK, BLUE, ORANGE, VERMILION, arguments, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from masksolve.diversity import bits_per_weight, log2_count
from masksolve.diversity._paper_formula import paper_formula

DENSITIES = {"half": (1, 2), "a quarter": (1, 4)}
LARGEST = 64


def rows() -> list[dict[str, Any]]:
    """One row per pattern."""
    found = []
    for n, m in DENSITIES.values():
        for k in (1, 2, 3, 4, 6, 8, 12, 16, 32):
            if k * m > LARGEST:
                continue
            found.append(
                {
                    "pattern": f"{k * n}:{k * m}",
                    "M": k * m,
                    "density": n / m,
                    "transposable": bits_per_weight(k * n, k * m),
                    "counted": "exactly" if log2_count(k * n, k * m).exact else "asymptotic",
                    "one-sided": bits_per_weight(k * n, k * m, direction="rows"),
                    "unstructured": bits_per_weight(n, m, direction="unstructured"),
                    "paper's formula": math.log2(paper_formula(k * n, k * m)) / (k * m) ** 2,
                }
            )
    return found


def draw(axes: Axes, found: list[dict[str, Any]], title: str) -> None:
    """Draw the curves of one density."""
    sizes = [row["M"] for row in found]
    axes.axhline(found[0]["unstructured"], color=BLACK, label="unstructured (ceiling)")
    axes.plot(sizes, [row["one-sided"] for row in found], "s-", color=ORANGE, label="one-sided, exact")
    axes.plot(sizes, [row["transposable"] for row in found], "-", color=BLUE)
    for kind, fill in (("exactly", BLUE), ("asymptotic", "white")):
        some = [row for row in found if row["counted"] == kind]
        label = f"transposable, {'exact' if kind == 'exactly' else 'asymptotic'}"
        axes.plot(
            [row["M"] for row in some],
            [row["transposable"] for row in some],
            "o",
            color=BLUE,
            markerfacecolor=fill,
            label=label,
        )
    axes.plot(sizes, [row["paper's formula"] for row in found], "^--", color=VERMILION, label="transposable, paper's")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2, 4, 8, 16, 32, 64], [2, 4, 8, 16, 32, 64])
    axes.set_xlim(0.85 * sizes[0], 1.15 * sizes[-1])
    axes.set_ylim(0, 1.7)
    axes.set_xlabel("M")
    axes.set_title(title)


def main() -> None:
    """Draw and save."""
    options = arguments(__doc__)
    found = rows()
    figure = Figure(figsize=(11, 6))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (name, (n, m)) in zip((left, right), DENSITIES.items(), strict=True):
        draw(axes, [row for row in found if row["density"] == n / m], f"{name} of the weights kept")
    left.set_ylabel("mask diversity, bits per weight")
    right.legend(loc="upper left", fontsize=12)
    figure.suptitle("The paper's formula passes the ceiling: more masks than there are subsets", fontsize=15)
    save(figure, found, "bits_per_weight", options.into)


if __name__ == "__main__":
    main()
