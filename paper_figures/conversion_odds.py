"""Figure (f): the odds that unstructured-sparse weights are N:M already, against sparsity: formula and measured.

Lines: the odds where weights are zero independently of each other. Points: the share of groups, and of tiles, of
Gaussian matrices and of MiniLM's encoder matrices after each matrix lost its smallest weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from _figure import BLUE, DARK_ORANGE, GREY, PURPLE, arguments, encoder_matrices, save
from matplotlib.figure import Figure
from numpy.typing import NDArray

from masksolve.odds import group_odds, share_of_groups, share_of_tiles, tile_odds

PATTERNS = {(2, 4): BLUE, (4, 8): DARK_ORANGE, (8, 16): PURPLE}
SPARSITIES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
FINE = np.linspace(0.3, 0.99, 70)
GAUSSIAN_SIZE = 1536


def pruned(matrix: NDArray[Any], sparsity: float) -> NDArray[Any]:
    """Return the matrix without its smallest weights."""
    dropped = round(sparsity * matrix.size)
    threshold = np.partition(np.abs(matrix).ravel(), dropped)[dropped]
    return np.where(np.abs(matrix) >= threshold, matrix, 0)


def share(matrices: list[NDArray[Any]], measure: Any, n: int, m: int) -> float:
    """Return the share of all matrices together; every matrix is whole tiles."""
    return float(
        np.average([measure(matrix, n, m) for matrix in matrices], weights=[matrix.size for matrix in matrices])
    )


def rows(tensors: dict[str, list[NDArray[Any]]]) -> list[dict[str, Any]]:
    """One row a sparsity and pattern."""
    found = []
    for sparsity in SPARSITIES:
        sparse = {name: [pruned(matrix, sparsity) for matrix in matrices] for name, matrices in tensors.items()}
        for n, m in PATTERNS:
            row = {
                "sparsity": sparsity,
                "pattern": f"{n}:{m}",
                "group, formula": group_odds(sparsity, n, m),
                "tile, formula": tile_odds(sparsity, n, m, rng=0).value,
            }
            for name, matrices in sparse.items():
                row[f"group, {name}"] = share(matrices, share_of_groups, n, m)
                row[f"tile, {name}"] = share(matrices, share_of_tiles, n, m)
            found.append(row)
    return found


def figure_of(found: list[dict[str, Any]]) -> Figure:
    """Draw groups on the left, tiles on the right."""
    figure = Figure(figsize=(12, 6.5))
    axes_row = figure.subplots(1, 2, sharey=True)
    for axes, unit in zip(axes_row, ("group", "tile"), strict=True):
        for (n, m), color in PATTERNS.items():
            if unit == "group":
                odds = [group_odds(p, n, m) for p in FINE]
            else:
                odds = [tile_odds(p, n, m, samples=20_000, rng=0).value for p in FINE]
            axes.plot(FINE, odds, color=color, label=f"{n}:{m}, formula")
            some = [row for row in found if row["pattern"] == f"{n}:{m}"]
            for name, marker, fill in (("Gaussian", "o", "white"), ("MiniLM", "^", color)):
                axes.plot(
                    [row["sparsity"] for row in some],
                    [row[f"{unit}, {name}"] for row in some],
                    marker,
                    color=color,
                    markerfacecolor=fill,
                    label=f"{n}:{m}, {name} pruned by magnitude",
                    linestyle="none",
                )
        axes.axhline(0.95, color=GREY, linestyle=":")
        axes.set_xlabel("sparsity: share of weights that are zero")
    axes_row[0].set_ylabel("share that is N:M already")
    axes_row[0].text(0.3, 0.96, "AdaPrune's confidence, 0.95", color=GREY, fontsize=12)
    axes_row[0].set_title("one group of M (one-sided)")
    axes_row[1].set_title("one tile of M×M (transposable)")
    handles, labels = axes_row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=11)
    return figure


def main() -> None:
    """Compute, draw and save."""
    options = arguments(__doc__)
    gaussian = np.random.default_rng(0).standard_normal((GAUSSIAN_SIZE, GAUSSIAN_SIZE)).astype(np.float32)
    found = rows({"Gaussian": [gaussian], "MiniLM": [matrix for _, matrix in encoder_matrices(options.weights)]})
    save(figure_of(found), found, "conversion_odds", options.into)


if __name__ == "__main__":
    main()
