"""The tables, the figure and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from paper_figures._figure import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILION, save, with_table
from paper_figures.permutation.study import AXES, FREE, PATTERNS, Case, Gain

_SOURCES = ("MiniLM", "SmolLM2", "Gaussian")
_COLORS = {"rows": BLUE, "columns": GREEN, "both": VERMILION, FREE: ORANGE}
# A gain of fewer points, on all patterns, would not have been worth a command.
WORTH = 0.3
Results = Sequence[tuple[Case, Sequence[Gain]]]


def draw(results: Results, into: Path) -> None:
    """Write the figure as PNG and CSV, and the tables and the verdict on the page if that is there."""
    gains = _of_all_matrices(results)
    rows = [asdict(each) for each in gains]
    save(gain_figure(gains), rows, "gain", into, table=gain_table(gains))
    page = into / "README.md"
    if page.exists():
        text = with_table(page.read_text(), "time", time_table(results))
        page.write_text(with_table(text, "verdict", verdict(gains)))


def _of_all_matrices(results: Results) -> list[Gain]:
    """Return a gain for each matrix, pattern and axes: that of the shortest search, which all matrices have."""
    found: dict[tuple[str, str, str, str], Gain] = {}
    for _, gains in sorted(results, key=lambda result: -result[0].seconds):
        for each in gains:
            found[each.source, each.matrix, each.pattern, each.axes] = each
    return sorted(found.values(), key=lambda each: (each.source, each.matrix, each.pattern, each.axes))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _gained(gains: Sequence[Gain], source: str, pattern: str, axes: str) -> float | None:
    """Return the mean gain in points, if there is any such gain."""
    mine = [
        each.after - each.before for each in gains if (each.source, each.pattern, each.axes) == (source, pattern, axes)
    ]
    return 100 * _mean(mine) if mine else None


def gain_table(gains: Sequence[Gain]) -> list[dict[str, Any]]:
    """Means over the matrices of a source: what is kept in per cent, and gains in points."""
    table = []
    for source in _SOURCES:
        for pattern in PATTERNS:
            mine = [each for each in gains if (each.source, each.pattern, each.axes) == (source, pattern, "both")]
            if not mine:
                continue
            row: dict[str, Any] = {"weights": source, "pattern": pattern}
            row["kept, %"] = f"{100 * _mean([each.before for each in mine]):.2f}"
            for axes in (*AXES, FREE):
                gain = _gained(gains, source, pattern, axes)
                row[axes] = "-" if gain is None else f"{gain:+.2f}"
            row["both, at most"] = f"{100 * _mean([each.bound - each.before for each in mine]):+.2f}"
            row["one-sided, %"] = f"{100 * _mean([each.one_sided for each in mine]):.2f}"
            row["unstructured, %"] = f"{100 * _mean([each.unstructured for each in mine]):.2f}"
            table.append(row)
    return table


def time_table(results: Results) -> list[dict[str, Any]]:
    """Gains of both axes by the time of the search, on the matrices that were searched for longer too."""
    table = []
    for pattern in PATTERNS:
        found: dict[tuple[str, str], dict[float, float]] = {}
        for case, gains in results:
            for each in gains:
                if each.axes == "both" and each.pattern == pattern:
                    found.setdefault((each.source, each.matrix), {})[case.seconds] = 100 * (each.after - each.before)
        several = [each for each in found.values() if len(each) > 1]
        if several:
            limits = sorted(several[0])
            table.append(
                {
                    "pattern": pattern,
                    "matrices": len(several),
                    **{f"{2 * limit:g} s": f"{_mean([each[limit] for each in several]):+.2f}" for limit in limits},
                }
            )
    return table or [{"pattern": "-", "matrices": "-"}]


def verdict(gains: Sequence[Gain]) -> list[dict[str, Any]]:
    """Return the questions, and what the results say."""
    rows = []
    for what, axes in (
        ("both axes of a matrix, whatever shares them", "both"),
        ("the axes that a model leaves free", FREE),
    ):
        for source in _SOURCES:
            found = {pattern: _gained(gains, source, pattern, axes) for pattern in PATTERNS}
            known = {pattern: gain for pattern, gain in found.items() if gain is not None}
            if known:
                worth = [pattern for pattern, gain in known.items() if gain >= WORTH] or ["no pattern"]
                answer = ", ".join(f"{pattern} {gain:+.2f}" for pattern, gain in known.items())
                rows.append(
                    {
                        "gain in points, by reordering": what,
                        "weights": source,
                        "found": answer,
                        f"{WORTH} or more at": ", ".join(worth),
                    }
                )
    return rows


def gain_figure(gains: Sequence[Gain]) -> Figure:
    """Gains in points by pattern, a panel for each source, under the most that any order could gain."""
    figure = Figure(figsize=(14, 5))
    for axes, source in zip(figure.subplots(1, len(_SOURCES), sharey=True), _SOURCES, strict=True):
        mine = [each for each in gains if each.source == source]
        for moved, color in _COLORS.items():
            points = [(place, _gained(mine, source, pattern, moved)) for place, pattern in enumerate(PATTERNS)]
            known = [(place, gain) for place, gain in points if gain is not None]
            axes.plot(*zip(*known, strict=True) if known else ([], []), "o-", color=color, label=moved)
        for what, color in (("bound", BLACK), ("one_sided", GREY)):
            levels = [
                (place, 100 * _mean([getattr(each, what) - each.before for each in of_pattern]))
                for place, pattern in enumerate(PATTERNS)
                if (of_pattern := [each for each in mine if (each.pattern, each.axes) == (pattern, "both")])
            ]
            label = {"bound": "both, at most", "one_sided": "one-sided masks, as it is"}[what]
            axes.plot(*zip(*levels, strict=True) if levels else ([], []), "--", color=color, label=label)
        axes.set_title(source)
        axes.set_xticks(range(len(PATTERNS)), PATTERNS)
    figure.axes[0].set_ylabel("kept importance, points gained")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
