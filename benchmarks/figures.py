"""Draws the figures: log axes, lines named where they end, colours and dashes that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from benchmarks.growth import Cell
from benchmarks.measure import Row
from benchmarks.solvers import Solver

mpl.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's palette.
BLACK, BLUE, VERMILION, GREEN, GREY = "#000000", "#0072B2", "#D55E00", "#009E73", "#777777"
FONT = 17

_LOOKS: dict[str, dict[str, Any]] = {
    "masksolve exact": {"color": BLACK, "linestyle": "-", "marker": "o", "linewidth": 4.5, "markersize": 11},
    "masksolve, other methods": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "others, exact": {"color": VERMILION, "linestyle": "--", "marker": "s"},
    "others, approximate": {"color": GREEN, "linestyle": ":", "marker": "^"},
    "memory floor": {"color": GREY, "linestyle": "-.", "marker": "x"},
}


def time_per_tile(rows: Sequence[Row], solvers: Iterable[Solver], title: str, path: Path) -> None:
    """Microseconds per tile of Gaussian weights against M, for the patterns that keep half."""
    plt.rcParams["font.size"] = FONT
    figure, axes = plt.subplots(figsize=(14, 11), layout="constrained")
    left, right = [], []
    for solver in solvers:
        points = sorted(_points(rows, solver.name))
        if not points:
            continue
        kind = _kind(solver)
        axes.plot(*zip(*points, strict=True), **{"linewidth": 2.2, "markersize": 8, **_LOOKS[kind]})
        end = right if len(points) > 1 else left
        end.append((points[-1], solver.name, _LOOKS[kind]["color"]))
    axes.set(xscale="log", yscale="log", xlim=(1.75, 85), xlabel="M, tile of M×M entries", title=title)
    axes.set_ylabel("time per tile, µs")
    axes.set_xticks([4, 8, 16, 32], ["4\n(2:4)", "8\n(4:8)", "16\n(8:16)", "32\n(16:32)"])
    axes.set_ylim(bottom=axes.get_ylim()[0] / 4)  # room for the legend
    axes.minorticks_off()
    axes.grid(visible=True, which="major", color="#dddddd")
    name_ends(axes, right, at=35.5, align="left")
    name_ends(axes, left, at=3.6, align="right")
    handles = [plt.Line2D([], [], label=kind, **{"linewidth": 2.2, **look}) for kind, look in _LOOKS.items()]
    axes.legend(handles=handles, loc="lower right", framealpha=1)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(cells: Sequence[Cell], path: Path) -> None:
    """Three panels: time against the matrix, cost of a weight against M, and memory against the matrix."""
    plt.rcParams["font.size"] = 1.4 * FONT
    figure, (time, cost, memory) = plt.subplots(1, 3, figsize=(26, 10), layout="constrained")
    shown = {4: GREY, 8: BLUE, 16: GREEN, 32: VERMILION, 64: BLACK}
    look = {"marker": "o", "linewidth": 3, "markersize": 9}
    lines = dict(zip(sorted({cell.threads for cell in cells}), ("-", "--"), strict=False))
    largest = max(cell.side for cell in cells)
    for threads, line in lines.items():
        for m, colour in shown.items():
            some = [cell for cell in cells if (cell.m, cell.threads) == (m, threads)]
            sides = [cell.side for cell in some]
            time.plot(sides, [cell.seconds * 1e3 for cell in some], color=colour, linestyle=line, **look)
            if all(cell.peak_bytes is not None for cell in some):
                memory.plot(sides, [cell.peak_bytes / 2**20 for cell in some], color=colour, linestyle=line, **look)
        some = [cell for cell in cells if cell.threads == threads and cell.side > 0.9 * largest]
        values = [cell.nanoseconds_per_weight for cell in some]
        cost.plot([cell.m for cell in some], values, color=BLACK, linestyle=line, **look)

    time.set(yscale="log", ylabel="ms", title="Time from matrix to mask")
    memory.set(ylabel="MiB", title="Peak memory beyond both", ylim=(0, max(1, memory.get_ylim()[1])))
    sides = sorted({cell.side for cell in cells if cell.m == 4})
    for axes in (time, memory):
        label_powers(axes.xaxis, sides[:: 2 if len(sides) > 5 else 1])
        axes.set_xlabel("rows and columns")
    cost.set(yscale="log", xlabel="M (N = M/2)", ylabel="ns", title=f"Time per weight at {largest}²")
    label_powers(cost.xaxis, sorted({cell.m for cell in cells}))
    label_powers(cost.yaxis, [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if _within(tick, cost.get_ylim())])
    for axes in (time, cost, memory):
        axes.minorticks_off()
        axes.grid(visible=True, color="#dddddd")

    dashes = [
        plt.Line2D([], [], color=BLACK, linestyle=line, linewidth=3, label=f"{threads} thread{'s' * (threads > 1)}")
        for threads, line in lines.items()
    ]
    patterns = [plt.Line2D([], [], color=colour, label=f"{m // 2}:{m}", **look) for m, colour in shown.items()]
    time.legend(handles=patterns)
    cost.legend(handles=dashes)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def label_powers(axis: Any, ticks: Sequence[float]) -> None:
    """Plain numbers at these ticks of a log axis, and no others."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def name_ends(axes: Any, ends: list[tuple[tuple[float, float], str, str]], *, at: float, align: str) -> None:
    """Write names beside the ends of lines, ((x, y), name, colour), moved apart where they would overlap."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[0][1])
    low, high = np.log10(axes.get_ylim())
    heights = spread([np.log10(y) for (_, y), _, _ in ends], gap=(high - low) / 30)
    for ((x, y), name, colour), height in zip(ends, heights, strict=True):
        axes.plot([x, at], [y, 10**height], color=colour, linewidth=0.7)
        axes.text(at, 10**height, f" {name} ", color=colour, ha=align, va="center", fontsize=FONT - 1)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved as little as it takes to stand at least a gap apart: neighbours share what they lack."""
    groups: list[tuple[list[float], float]] = []
    for height in heights:
        members, centre = [height], height
        while groups and groups[-1][1] + gap * (len(groups[-1][0]) + len(members)) / 2 > centre:
            members = groups.pop()[0] + members
            centre = float(np.mean(members))
        groups.append((members, centre))
    return [c + gap * (i - (len(g) - 1) / 2) for g, c in groups for i in range(len(g))]


def _points(rows: Sequence[Row], name: str) -> list[tuple[int, float]]:
    points = []
    for row in rows:
        n, m = map(int, row.pattern.split(":"))
        if row.solver == name and row.weights == "gaussian" and 2 * n == m:
            points.append((m, row.microseconds_per_tile))
    return points


def _kind(solver: Solver) -> str:
    if solver.name == "numpy.abs":
        return "memory floor"
    if solver.is_ours:
        return "masksolve exact" if solver.name == "exact" else "masksolve, other methods"
    return "others, exact" if solver.is_exact else "others, approximate"
