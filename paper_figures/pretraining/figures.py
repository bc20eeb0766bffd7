"""The tables, and losses against tokens and against the work that is left, from the results of all runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from paper_figures._figure import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, save, with_table
from paper_figures.pretraining.recipes import GRADIENTS, PATTERNS, RECIPES, Recipe
from paper_figures.pretraining.run import Run
from paper_figures.training.figures import mean_and_error

MODELS = ("gpt 0.8M", "vision transformer", "gpt 10.6M")
_COLORS = {
    "dense": BLACK,
    "one-sided": ORANGE,
    "transposable": BLUE,
    "random": SKY,
    "bi-mask": PURPLE,
    "slope": VERMILION,
}
_MARKERS = {"2:4": "o", "4:8": "s", "8:16": "D", "16:32": "P", "-": "*"}


def draw(runs: Sequence[Run], into: Path) -> None:
    """Write both figures as PNG and CSV, and the tables on the page if that is there."""
    rows = [row for recipe in RECIPES if (row := _row(recipe, runs))]
    of_runs = [{**asdict(run), "loss": f"{run.losses[-1][1]:.5f}"} for run in runs]
    for each in of_runs:
        del each["losses"]
    save(work_figure(runs), of_runs, "loss", into, table=rows)
    curves = [
        {"model": run.model, "recipe": run.recipe, "seed": run.seed, "step": step, "loss": f"{loss:.5f}"}
        for run in runs
        for step, loss in run.losses
    ]
    save(curve_figure(runs), curves, "curves", into, table=_differences(runs))
    page = into / "README.md"
    if page.exists():
        page.write_text(with_table(page.read_text(), "costs", _costs(runs)))


def final_losses(recipe: Recipe, model: str, runs: Sequence[Run]) -> dict[int, float]:
    """Return the last loss of each seed."""
    return {run.seed: run.losses[-1][1] for run in runs if (run.recipe, run.model) == (recipe.name, model)}


def _row(recipe: Recipe, runs: Sequence[Run]) -> dict[str, Any]:
    """Return one line of the table; nothing without runs."""
    row: dict[str, Any] = {"masks": recipe.name, "sparse products": recipe.sparse_products, "work": recipe.work}
    found = {model: final_losses(recipe, model, runs) for model in MODELS}
    if not any(found.values()):
        return {}
    for model, losses in found.items():
        row[f"{model}, loss"] = _with_error(list(losses.values())) if losses else "-"
    mine = [run for run in runs if run.recipe == recipe.name and run.model == MODELS[0]]
    for figure in ("kept", "flips"):
        values = [value for run in mine if (value := getattr(run, figure)) is not None]
        row[f"{MODELS[0]}, {figure}"] = f"{statistics.fmean(values):.3f}" if values else "-"
    return row


def _with_error(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.4f} ± {error:.4f}" if len(values) > 1 else f"{mean:.4f}"


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the losses above those of the dense model of the same seed, transposable masks by pattern and gradient."""
    table = []
    for model in MODELS:
        dense = final_losses(Recipe("dense"), model, runs)
        for pattern in PATTERNS:
            row: dict[str, Any] = {"model": model, "masks": pattern}
            for gradient in GRADIENTS:
                mine = final_losses(Recipe("transposable", pattern, gradient), model, runs)
                above = [loss - dense[seed] for seed, loss in mine.items() if seed in dense]
                row[gradient] = _with_error(above) if above else "-"
            if set(row.values()) != {model, pattern, "-"}:
                table.append(row)
    return table or [{"model": "-", "masks": "-"}]


def _costs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the time of a run of each model, and the share of it that refreshes take."""
    table = []
    for model in MODELS:
        mine = [run for run in runs if run.model == model]
        if mine:
            seconds = statistics.median(run.seconds for run in mine)
            each = [run for run in mine if run.in_masks and "every" not in run.recipe]
            shares = [run.in_masks / run.seconds for run in each if "soft" not in run.recipe]
            soft = [run.in_masks / run.seconds for run in each if "soft" in run.recipe]
            row = {"model": model, "steps": mine[0].steps, "seconds of one core": f"{seconds:.0f}"}
            row["in masks, %"] = f"{100 * statistics.fmean(shares):.1f}" if shares else "-"
            row["in soft masks, %"] = f"{100 * statistics.fmean(soft):.1f}" if soft else "-"
            table.append(row)
    return table or [{"model": "-"}]


def _models(runs: Sequence[Run]) -> list[str]:
    return [model for model in MODELS if any(run.model == model for run in runs)]


def work_figure(runs: Sequence[Run]) -> Figure:
    """Loss against the multiplications that are left, a panel for each model; straight-through gradients."""
    models = _models(runs)
    figure = Figure(figsize=(2 + 5 * len(models), 6))
    shown = [recipe for recipe in RECIPES if recipe.gradient in ("-", "ste") and recipe.every == recipe.rate == 1]
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for recipe in shown:
            losses = list(final_losses(recipe, model, runs).values())
            if losses:
                mean, error = mean_and_error(losses)
                axes.errorbar(
                    recipe.work,
                    mean,
                    error if len(losses) > 1 else 0,
                    fmt=_MARKERS[recipe.pattern],
                    color=GREEN if recipe.thinned != "-" else _COLORS[recipe.masks],
                    capsize=4,
                    markersize=10,
                    label=recipe.name,
                )
        axes.set_title(model)
        axes.set_xlabel("multiplications left, share of the dense ones")
        axes.set_ylabel(f"loss on {'text' if model.startswith('gpt') else 'images'} held out")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=11)
    return figure


def curve_figure(runs: Sequence[Run]) -> Figure:
    """Loss over the steps, over that of the dense model at the same step; the mean over seeds, transposable masks."""
    models = _models(runs)
    figure = Figure(figsize=(2 + 5 * len(models), 6))
    colors = dict(zip(PATTERNS, (VERMILION, BLUE, GREEN, PURPLE), strict=True))
    styles = dict(zip(GRADIENTS, ("-", "--", "-.", ":"), strict=True))
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        dense = _mean_curve(Recipe("dense"), model, runs)
        for pattern in PATTERNS:
            for gradient in GRADIENTS:
                curve = _mean_curve(Recipe("transposable", pattern, gradient), model, runs)
                steps = [step for step in curve if step in dense]
                above = [curve[step] - dense[step] for step in steps]
                axes.plot(steps, above, styles[gradient], color=colors[pattern], label=f"{pattern} {gradient}")
        axes.set_title(model)
        axes.set_xlabel("step")
    figure.axes[0].set_ylabel("loss above the dense model's")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=11)
    return figure


def _mean_curve(recipe: Recipe, model: str, runs: Sequence[Run]) -> dict[int, float]:
    mine = [run.losses for run in runs if (run.recipe, run.model) == (recipe.name, model)]
    return {points[0][0]: statistics.fmean(loss for _, loss in points) for points in zip(*mine, strict=True)}
