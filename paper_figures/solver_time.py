"""Figure (e), first part: time per tile against M, of every solver, on one thread."""

from __future__ import annotations

from _timing import SOLVERS, seconds_per_tile  # isort: skip  (sets the number of threads before NumPy is loaded)

from typing import Any

from _figure import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION, arguments, save
from matplotlib.figure import Figure

SIZES = (4, 8, 16, 32)
STYLES = dict(zip(SOLVERS, zip("sDv^Po", (VERMILION, ORANGE, PURPLE, GREEN, BLACK, BLUE), strict=True), strict=True))


def figure_of(found: list[dict[str, Any]]) -> Figure:
    """One line a solver."""
    figure = Figure(figsize=(9, 6.5))
    axes = figure.subplots()
    for row in found:
        marker, color = STYLES[row["solver"]]
        axes.loglog(SIZES, [row[f"µs, M = {m}"] for m in SIZES], marker + "-", color=color, label=row["solver"])
    axes.set_xticks(SIZES, SIZES)
    axes.minorticks_off()
    axes.set_xlabel("M, with half of the weights kept")
    axes.set_ylabel("time per M×M tile, µs, one thread")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def main() -> None:
    """Measure, draw and save."""
    options = arguments(__doc__)
    found = [
        {"solver": solver} | {f"µs, M = {m}": 1e6 * seconds_per_tile(solver, m // 2, m) for m in SIZES}
        for solver in SOLVERS
    ]
    save(figure_of(found), found, "solver_time", options.into)


if __name__ == "__main__":
    main()
