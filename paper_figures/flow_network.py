"""Figure (g): the min-cost-flow network of a 4x4 tile at 2:4, drawn with its solution."""

from __future__ import annotations

from typing import Any

import numpy as np
from _figure import BLACK, BLUE, GREY, arguments, save
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

import masksolve as ms

N, M = 2, 4
SYMBOLS = {"source": "s", "row": "r", "column": "c", "sink": "t"}
COLUMN_OF_NODES = {"source": 0.0, "row": 1.3, "column": 3.7, "sink": 5.0}


def tile() -> NDArray[np.float64]:
    """Sixteen different weights."""
    return np.random.default_rng(3).permutation(np.arange(1, M * M + 1)).reshape(M, M).astype(np.float64)


def rows(weights: NDArray[np.float64], mask: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """One row an arc."""
    arcs = [{"from": "source", "to": f"row {i}", "capacity": N, "cost": 0, "flow": N} for i in range(M)]
    arcs += [
        {"from": f"row {i}", "to": f"column {j}", "capacity": 1, "cost": -int(weights[i, j]), "flow": int(mask[i, j])}
        for i in range(M)
        for j in range(M)
    ]
    arcs += [{"from": f"column {j}", "to": "sink", "capacity": N, "cost": 0, "flow": N} for j in range(M)]
    return arcs


def place(node: str) -> tuple[float, float]:
    """Where a node is drawn."""
    kind, _, number = node.partition(" ")
    return COLUMN_OF_NODES[kind], (M - 1) / 2 if not number else M - 1 - int(number)


def draw_network(axes: Axes, arcs: list[dict[str, Any]]) -> None:
    """Arcs that carry flow in blue, with their cost; the others thin and grey."""
    for arc in sorted(arcs, key=lambda arc: arc["flow"]):
        (x0, y0), (x1, y1) = place(arc["from"]), place(arc["to"])
        used = arc["flow"] > 0
        axes.plot([x0, x1], [y0, y1], color=BLUE if used else "#bbbbbb", linewidth=1 + 1.5 * arc["flow"], zorder=1)
        if used and arc["cost"]:
            # Near the row, where arcs have not crossed yet.
            at = 0.2
            axes.text(
                x0 + at * (x1 - x0),
                y0 + at * (y1 - y0),
                f"{arc['cost']}".replace("-", "−"),
                ha="center",
                va="center",
                fontsize=12,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
            )
    for node in dict.fromkeys(arc[end] for arc in arcs for end in ("from", "to")):
        x, y = place(node)
        axes.plot(x, y, "o", markersize=34, color="white", markeredgecolor=BLACK, markeredgewidth=1.5, zorder=2)
        kind, _, number = node.partition(" ")
        axes.text(x, y, f"{SYMBOLS[kind]}{number}", ha="center", va="center", fontsize=13, zorder=3)
    for kind, label in (
        ("source", f"source\ngives {N * M}"),
        ("row", f"rows\ncapacity {N}"),
        ("column", f"columns\ncapacity {N}"),
        ("sink", f"sink\ntakes {N * M}"),
    ):
        axes.text(COLUMN_OF_NODES[kind], M - 0.35, label, ha="center", va="bottom", fontsize=12)
    axes.set_xlim(-0.5, 5.5)
    axes.set_ylim(-0.5, M + 0.3)
    axes.axis("off")


def draw_tile(axes: Axes, weights: NDArray[np.float64], mask: NDArray[np.bool_]) -> None:
    """Draw the weights, those kept on blue."""
    axes.imshow(mask, cmap=ListedColormap(["white", BLUE]), vmin=0, vmax=1)
    for (i, j), weight in np.ndenumerate(weights):
        axes.text(j, i, f"{weight:.0f}", ha="center", va="center", color="white" if mask[i, j] else BLACK, fontsize=15)
    axes.set_xticks(range(M), [f"c{j}" for j in range(M)])
    axes.set_yticks(range(M), [f"r{i}" for i in range(M)])
    axes.set_xticks(np.arange(M + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(M + 1) - 0.5, minor=True)
    axes.grid(visible=False)
    axes.grid(which="minor", color=GREY)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel(f"kept: {weights[mask].sum():.0f} of {weights.sum():.0f}")


def main() -> None:
    """Solve, draw and save."""
    options = arguments(__doc__)
    weights = tile()
    mask = ms.solve_block(weights, N, M, method="flow")
    if not ms.certify(weights, mask, N, M).optimal:
        raise RuntimeError("the flow is not optimal")
    arcs = rows(weights, mask)
    figure = Figure(figsize=(12, 5.5))
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.4])
    draw_tile(left, weights, mask)
    draw_network(right, arcs)
    figure.suptitle(
        "A 2:4 tile as a min-cost flow: entry (i, j) is an arc of capacity 1 and cost −|w|; blue arcs carry flow"
    )
    save(figure, arcs, "flow_network", options.into, arcs[:3])


if __name__ == "__main__":
    main()
