"""Accuracy against density, and against parameters; densities by layer; what survives both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures._figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, save, with_table
from paper_figures.neighbours.models import MODELS
from paper_figures.neighbours.recipes import METHODS, Recipe
from paper_figures.neighbours.run import Run

_LINES = {"dynamic": BLUE, "magnitude": ORANGE, "sr-ste": GREEN}
_TICKS = (2, 5, 10, 20, 50, 100)
_FILTERS = dict(zip(METHODS, (BLUE, ORANGE, GREEN, SKY, PURPLE), strict=True))


def draw(runs: Sequence[Run], into: Path) -> None:
    """Write the figures as PNG and CSV, and the tables on the page if that is there."""
    of_weights = [each for each in runs if each.recipe.kind not in METHODS]
    of_filters = [each for each in runs if each.recipe.kind in METHODS]
    if of_weights:
        save(_figure(runs, _LINES, "density"), _rows(of_weights), "density", into, table=density_table(runs))
    if of_filters:
        save(_figure(runs, _FILTERS, "parameters kept"), _rows(of_filters), "filters", into, table=filter_table(runs))
    page, both = into / "README.md", both_table(runs)
    if page.exists() and both:
        page.write_text(with_table(page.read_text(), "both", both))


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [{**asdict(each), "recipe": each.recipe.name, "layers": _densities(each.layers)} for each in runs]


def _densities(layers: Sequence[float]) -> str:
    return " ".join(f"{each:.3g}" for each in layers)


def _of(runs: Sequence[Run], model: str, wanted: Callable[[Recipe], bool]) -> dict[Recipe, list[Run]]:
    """Return the runs of a model's recipes, by recipe."""
    found: dict[Recipe, list[Run]] = {}
    for each in runs:
        if each.model == model and wanted(each.recipe):
            found.setdefault(each.recipe, []).append(each)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(values: Sequence[float]) -> str:
    error = f" ± {100 * statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{100 * _mean(values):.2f}{error}"


def density_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each way to sparse weights: density, accuracy, and the densities of layers."""
    table = []
    for model in MODELS:
        found = _of(runs, model, lambda recipe: recipe.kind in ("dense", *_LINES) and _plain(recipe))
        for recipe, mine in found.items():
            layers = [_mean([each.layers[place] for each in mine]) for place in range(len(mine[0].layers))]
            table.append(
                {
                    "model": model,
                    "recipe": recipe.name,
                    "density, %": f"{100 * _mean([each.density for each in mine]):.2f}",
                    "accuracy, %": _percent([each.accuracy for each in mine]),
                    "densities of layers": _densities(layers),
                    "seeds": len(mine),
                }
            )
    return table


def filter_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each way to cut filters: weights left, accuracy before and after training again."""
    return _two_steps(runs, "trained again", lambda recipe: recipe.kind in METHODS and not recipe.pattern)


def both_table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each model that N:M masks follow on."""
    return _two_steps(runs, "N:M", lambda recipe: recipe.kind != "sr-ste" and bool(recipe.pattern))


def _two_steps(runs: Sequence[Run], second: str, wanted: Callable[[Recipe], bool]) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "recipe": recipe.name,
            "weights left, %": f"{100 * _mean([each.density for each in mine]):.2f}",
            "accuracy before, %": _percent([each.before or 0.0 for each in mine]),
            f"accuracy, {second}, %": _percent([each.accuracy for each in mine]),
            "seeds": len(mine),
        }
        for model in MODELS
        for recipe, mine in _of(runs, model, wanted).items()
    ]


def _plain(recipe: Recipe) -> bool:
    """Whether nothing follows it."""
    return not recipe.pattern or recipe.kind == "sr-ste"


def _figure(runs: Sequence[Run], colors: dict[str, str], what: str) -> Figure:
    figure = Figure(figsize=(14, 5))
    for axes, model in zip(figure.subplots(1, len(MODELS)), MODELS, strict=True):
        _panel(axes, runs, model, colors)
        axes.set(title=model, xlabel=f"{what}, %")
        axes.set_xscale("log")
        axes.set_xticks(_TICKS, map(str, _TICKS))
        axes.minorticks_off()
    figure.axes[0].set_ylabel("accuracy, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _panel(axes: Axes, runs: Sequence[Run], model: str, colors: dict[str, str]) -> None:
    dense = [each.accuracy for each in runs if each.model == model and each.recipe.kind == "dense"]
    if dense:
        axes.axhline(100 * _mean(dense), color=GREY, linestyle="--", label="dense")
    for kind, color in colors.items():
        found = _of(runs, model, lambda recipe, kind=kind: recipe.kind == kind and _plain(recipe))
        points = _points(found)
        axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=color, label=kind)
    for kind, color, marker in (("dynamic", BLACK, "s"), (METHODS[0], VERMILION, "D")):
        if kind in colors:
            found = _of(runs, model, lambda recipe, kind=kind: recipe.kind == kind and bool(recipe.pattern))
            points = _points(found)
            label = f"{kind}, then N:M"
            axes.plot(*zip(*points, strict=True) if points else ([], []), marker, color=color, label=label)


def _points(found: dict[Recipe, list[Run]]) -> list[tuple[float, float]]:
    """Return densities and accuracies in per cent, from one amount to the next, as lines connect them."""
    ordered = sorted(found.items(), key=lambda item: (item[0].amount, item[0].pattern))
    return [
        (100 * _mean([run.density for run in group]), 100 * _mean([run.accuracy for run in group]))
        for _, group in ordered
    ]
