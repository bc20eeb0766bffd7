"""The table, accuracy against mask diversity, and flip rates, from the results of all runs."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper_figures._figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, save
from paper_figures.training.models import ARCHITECTURES
from paper_figures.training.recipes import RECIPES, Recipe
from paper_figures.training.train import Run

_COLORS = {"2:4": VERMILION, "4:8": BLUE, "8:16": GREEN, "-": BLACK}


def draw(results: Path, into: Path) -> None:
    """Write accuracy and flips, each as PNG and CSV, and their tables on the page if that is there."""
    runs = read(results)
    accuracies = [row for recipe in RECIPES if (row := accuracy_row(recipe, runs))]
    save(accuracy_figure(runs), accuracies, "accuracy", into)
    flips = flip_rows(runs)
    save(flip_figure(flips), flips, "flips", into, table=flip_table(flips))


def read(results: Path) -> list[Run]:
    """All results of a folder."""
    return [Run(**json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]


def check_epochs(results: Path, epochs: int) -> None:
    """Refuse a folder with runs of another setting, which would be taken for runs of this one."""
    for run in read(results):
        if run.epochs != epochs:
            raise SystemExit(
                f"{results} holds runs of {run.epochs} epochs, and this setting has {epochs}; give another --results"
            )


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error; nan of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def accuracies_of(recipe: Recipe, name: str, runs: list[Run]) -> list[float]:
    """In percent, one a seed."""
    return [100 * run.accuracy for run in runs if (run.recipe, run.model) == (recipe.name, name)]


def accuracy_row(recipe: Recipe, runs: list[Run]) -> dict[str, Any]:
    """One line of the table."""
    mine = [run for run in runs if run.recipe == recipe.name]
    exact, formula = recipe.bits()
    row: dict[str, Any] = {"masks": recipe.name, "bits per weight": exact, "paper's bits": formula}
    for name in ARCHITECTURES:
        values = accuracies_of(recipe, name, runs)
        if not values:
            return {}
        mean, error = mean_and_error(values)
        row[f"{name}, %"] = f"{mean:.2f} ± {error:.2f}" if len(values) > 1 else f"{mean:.2f}"
        kept = [run.kept for run in mine if run.model == name and run.kept is not None]
        row[f"{name}, kept"] = f"{statistics.fmean(kept):.3f}" if kept else "-"
    row["seeds"] = len({run.seed for run in mine})
    row["time in masks, %"] = 100 * statistics.fmean(run.mask_share for run in mine)
    return row


def accuracy_figure(runs: list[Run]) -> Figure:
    """Accuracy against diversity, the exact one filled and the paper's formula open, a panel for each model."""
    figure = Figure(figsize=(15, 6.5))
    shown = [
        (Recipe("unstructured", "-", "dynamic", "ste"), "unstructured", "P", BLACK),
        (Recipe("rows", "2:4", "dynamic", "ste", "exact"), "one-sided 2:4", "s", ORANGE),
        (Recipe("rows", "4:8", "dynamic", "ste", "exact"), "one-sided 4:8", "s", PURPLE),
        *(
            (Recipe("both", pattern, "dynamic", "ste", "exact"), f"transposable {pattern}", "o", _COLORS[pattern])
            for pattern in ("2:4", "4:8", "8:16")
        ),
    ]
    for axes, name in zip(figure.subplots(1, 2), ARCHITECTURES, strict=True):
        _accuracy_panel(axes, name, runs, shown)
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="the same, by the\npaper's formula")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=12)
    figure.suptitle("Accuracy against mask diversity: dynamic masks, straight-through gradients", fontsize=15)
    return figure


def _accuracy_panel(axes: Axes, name: str, runs: list[Run], shown: list[tuple[Recipe, str, str, str]]) -> None:
    for recipe, label, marker, color in shown:
        values = accuracies_of(recipe, name, runs)
        if not values:
            continue
        mean, error = mean_and_error(values)
        exact, formula = recipe.bits()
        style = {"fmt": marker, "color": color, "capsize": 4, "markersize": 10}
        axes.errorbar(exact, mean, 0 if math.isnan(error) else error, label=label, **style)
        if formula != exact:
            axes.plot([exact, formula], [mean, mean], ":", color=color, linewidth=1)
            axes.plot(formula, mean, marker, color=color, markerfacecolor="white", markersize=10)
    dense = accuracies_of(Recipe("dense"), name, runs)
    if dense:
        axes.axhline(statistics.fmean(dense), color=GREY, linestyle="--", label="dense")
    axes.set_title(name)
    axes.set_xlabel("mask diversity, bits per weight")
    axes.set_ylabel("test accuracy, %")


def flip_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """One row a model, recipe and refresh: the mean over the seeds."""
    rows = []
    for name in ARCHITECTURES:
        for recipe in RECIPES:
            mine = [run.flips for run in runs if (run.model, run.recipe) == (name, recipe.name)]
            if recipe.masks != "dynamic" or not mine:
                continue
            for at in zip(*mine, strict=True):
                rates = [rate for _, rate in at]
                rows.append(
                    {"model": name, "masks": recipe.name, "step": at[0][0], "flip rate": statistics.fmean(rates)}
                )
    return rows


def flip_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List the first and the last refresh, and one at half time, of every model and recipe."""
    table = []
    for model, masks in dict.fromkeys((row["model"], row["masks"]) for row in rows):
        mine = [row["flip rate"] for row in rows if (row["model"], row["masks"]) == (model, masks)]
        middle = mine[len(mine) // 2]
        table.append({"model": model, "masks": masks, "first": mine[0], "at half time": middle, "last": mine[-1]})
    return table


def flip_figure(rows: list[dict[str, Any]]) -> Figure:
    """Flip rate over time, a panel for each model."""
    figure = Figure(figsize=(15, 6))
    styles = {"ste": "-", "sr-ste": "--"}
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ARCHITECTURES, strict=True):
        for recipe in RECIPES:
            mine = [row for row in rows if (row["model"], row["masks"]) == (name, recipe.name)]
            if not mine or recipe.method == "greedy":
                continue
            color = {"rows": {"2:4": ORANGE, "4:8": PURPLE}.get(recipe.pattern, SKY)}.get(
                recipe.structure, _COLORS[recipe.pattern]
            )
            steps, rates = [row["step"] for row in mine], [row["flip rate"] for row in mine]
            axes.plot(steps, rates, styles[recipe.gradient], marker=".", color=color, label=recipe.name)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("share of the mask that changed in 40 steps")
    figure.legend(*figure.axes[1].get_legend_handles_labels(), loc="outside right upper", fontsize=12)
    return figure
