"""Draw the pictures of the site and of the README into docs/_static: `make drawings`."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

import masksolve as ms

FOLDER = Path(__file__).parent / "_static"
BLUE, ORANGE, GREY, PALE = "#0072B2", "#D55E00", "#767676", "#f2f2f2"
Matrix = NDArray[np.float64]


def main() -> None:
    """Draw all of them."""
    mpl.use("agg")
    mpl.rcParams.update({"font.size": 12, "savefig.dpi": 130, "savefig.facecolor": "white"})
    weights = np.random.default_rng(4).standard_normal((8, 8))
    tile(weights).savefig(FOLDER / "tile.png")
    rounds(np.abs(weights)).savefig(FOLDER / "rounds.png")


def _cells(axes: Axes, mask: NDArray[np.bool_], weights: Matrix, title: str, note: str = "") -> None:
    """Draw a tile: what is kept in colour, and how many of each line."""
    size = len(mask)
    sizes = np.abs(weights) / np.abs(weights).max()
    for row, column in np.ndindex(mask.shape):
        color = BLUE if mask[row, column] else PALE
        alpha = 0.25 + 0.75 * sizes[row, column] if mask[row, column] else 1.0
        axes.add_patch(mpl.patches.Rectangle((column, row), 0.94, 0.94, color=color, alpha=alpha, linewidth=0))
    for line in range(size):
        axes.text(size + 0.35, line + 0.5, str(mask[line].sum()), va="center", ha="center", color=GREY)
        axes.text(line + 0.47, size + 0.4, str(mask[:, line].sum()), va="center", ha="center", color=GREY)
    axes.set(xlim=(-0.1, size + 0.8), ylim=(size + 0.9, -0.1), aspect="equal", title=title, xlabel=note)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)


def tile(weights: Matrix) -> Figure:
    """Draw a tile's mask beside that of the transpose, and what is left of the weights."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    mask = ms.solve_block(weights, 4, 8)
    left, middle, right = figure.subplots(1, 3)
    everything = np.ones_like(mask)
    _cells(left, everything, weights, "a tile of weights", "the darker, the larger")
    for text in list(left.texts):
        text.remove()
    kept = float(np.abs(weights)[mask].sum() / np.abs(weights).sum())
    _cells(middle, mask, weights, "its best 4:8 mask", f"{kept:.0%} of the sum of |w| is kept")
    _cells(right, mask.T, weights.T, "transposed: 4:8 again")
    return figure


def rounds(importance: Matrix) -> Figure:
    """Draw which entries rows prefer after some rounds, until columns agree."""
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    n, m = 4, 8
    v = np.zeros(m)
    shown, history = [0, 1, 3], []
    for _ in range(200):
        order = np.sort(importance - v, axis=1)
        u = (order[:, m - n] + order[:, m - n - 1]) / 2
        preferred = importance - v > u[:, None]
        history.append(preferred)
        if (preferred.sum(0) == n).all():
            break
        order = np.sort(importance - u[:, None], axis=0)
        v = (order[m - n] + order[m - n - 1]) / 2
    last = len(history) - 1
    steps = [*(step for step in shown if step < last), last]
    for axes, step in zip(figure.subplots(1, len(steps)), steps, strict=True):
        counts = history[step].sum(0)
        wrong = int((counts != n).sum())
        title = f"after {step} round{'s' * (step > 1)}" if step else "at prices of 0"
        note = f"{wrong} columns do not have {n}" if wrong else f"every column has {n}: proven optimal"
        _cells(axes, history[step], importance, title, note)
        for place, count in enumerate(counts):
            if count != n:
                axes.add_patch(mpl.patches.Rectangle((place, m + 0.1), 0.94, 0.6, fill=False, edgecolor=ORANGE))
    return figure


if __name__ == "__main__":
    main()
