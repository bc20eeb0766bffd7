"""Draws the figures: log axes, lines named where they end, colours and dashes that the colour-blind tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

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


def label_powers(axis: Any, ticks: Sequence[float]) -> None:
    """Plain numbers at these ticks of a log axis, and no others."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


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
