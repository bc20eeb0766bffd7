"""Figure (c): importance that the best mask keeps, against mask diversity, for every constraint.

Does mask diversity predict it? Gaussian weights and the encoder matrices of MiniLM. Every mask is optimal: exact for
transposable, the largest of every group or of the matrix otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from _figure import BLACK, BLUE, DARK_ORANGE, GREY, ORANGE, arguments, encoder_matrices, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

import masksolve as ms
from masksolve.diversity import bits_per_weight
from masksolve.diversity._paper_formula import paper_formula

DENSITIES = {0.5: ["1:2", "2:4", "4:8", "8:16", "16:32"], 0.25: ["1:4", "2:8", "4:16", "8:32"]}
NAMES = {"unstructured": "unstructured", "rows": "one-sided", "both": "transposable"}
COLORS = {"unstructured": BLACK, "rows": ORANGE, "both": BLUE}
MARKERS = {"unstructured": "D", "rows": "s", "both": "o"}
GAUSSIAN_SIZE = 1024


def kept(matrices: Sequence[NDArray[Any]], pattern: ms.Pattern, direction: str) -> float:
    """Return the share of importance that the best masks of these matrices keep together."""
    total = sum(float(np.abs(matrix).sum(dtype=np.float64)) for matrix in matrices)
    best = 0.0
    for matrix in matrices:
        if direction == "unstructured":
            dropped = matrix.size * pattern.zeros // pattern.m
            best += float(np.partition(np.abs(matrix).ravel(), dropped)[dropped:].sum(dtype=np.float64))
        else:
            mask = ms.solve_matrix(matrix, pattern.n, pattern.m, direction=direction)
            best += float(np.abs(matrix).sum(dtype=np.float64, where=mask))
    return best / total


def rows(tensors: dict[str, Sequence[NDArray[Any]]]) -> list[dict[str, Any]]:
    """One row a constraint."""
    found = []
    for density, patterns in DENSITIES.items():
        for direction in NAMES:
            for pattern in map(ms.Pattern.parse, patterns[:1] if direction == "unstructured" else patterns):
                bits = bits_per_weight(pattern.n, pattern.m, direction=direction)
                formula = math.log2(paper_formula(pattern.n, pattern.m)) / pattern.m**2
                row = {
                    "density": density,
                    "constraint": NAMES[direction] + ("" if direction == "unstructured" else f" {pattern}"),
                    "bits per weight": bits,
                    "paper's bits": formula if direction == "both" else bits,
                }
                row |= {name: kept(matrices, pattern, direction) for name, matrices in tensors.items()}
                found.append(row)
    return found


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's, of values without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    return float(np.corrcoef(ranks)[0, 1])


def draw(axes: Axes, found: list[dict[str, Any]], x: str, y: str) -> None:
    """One point a constraint, the 50 % ones above, the 25 % ones below."""
    for density in DENSITIES:
        for direction, name in NAMES.items():
            points = [row for row in found if row["density"] == density and row["constraint"].startswith(name)]
            color = COLORS[direction]
            axes.plot(
                [row[x] for row in points],
                [row[y] for row in points],
                MARKERS[direction] + "-",
                color=color,
                label=name if density == 0.5 else None,
            )
            # On the side where the other curve is not.
            above = (direction == "both") == (x == "bits per weight")
            for row in points:
                place = ((-6, 6), "right") if above else ((6, -15), "left")
                if direction == "rows" and row is points[-1]:
                    # Its neighbour's label is already on that side.
                    place = ((0, 9), "center") if above else ((9, -8), "left")
                axes.annotate(
                    row["constraint"].removeprefix(name).strip(),
                    (row[x], row[y]),
                    xytext=place[0],
                    textcoords="offset points",
                    ha=place[1],
                    fontsize=11,
                    color=DARK_ORANGE if color == ORANGE else color,
                )


def figure_of(found: list[dict[str, Any]]) -> Figure:
    """Two rows of weights, two columns of measures."""
    figure = Figure(figsize=(12, 10.5))
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    for axes_row, weights in zip(grid, ("Gaussian", "MiniLM"), strict=True):
        for axes, x in zip(axes_row, ("bits per weight", "paper's bits"), strict=True):
            draw(axes, found, x, weights)
            correlations = [
                rank_correlation(*([row[key] for row in found if row["density"] == density] for key in (x, weights)))
                for density in DENSITIES
            ]
            axes.set_title(f"{weights}, rank correlation {correlations[0]:.2f} (50 %), {correlations[1]:.2f} (25 %)")
            axes.margins(x=0.13, y=0.1)
        axes_row[0].set_ylabel("share of the importance kept")
        axes_row[0].text(0.28, 0.60, "50 % of the weights kept", color=GREY)
        axes_row[0].text(0.6, 0.42, "25 % of the weights kept", color=GREY)
    grid[1, 0].set_xlabel("mask diversity, bits per weight: counted")
    grid[1, 1].set_xlabel("mask diversity, bits per weight: the paper's formula")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle("Counted exactly, mask diversity ranks the constraints by the importance they keep", fontsize=15)
    return figure


def main() -> None:
    """Compute, draw and save."""
    options = arguments(__doc__)
    gaussian = np.random.default_rng(0).standard_normal((GAUSSIAN_SIZE, GAUSSIAN_SIZE)).astype(np.float32)
    minilm = [matrix for _, matrix in encoder_matrices(options.weights)]
    found = rows({"Gaussian": [gaussian], "MiniLM": minilm})
    save(figure_of(found), found, "kept_importance", options.into)


if __name__ == "__main__":
    main()
