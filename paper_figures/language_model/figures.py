"""The table, the figure and what follows from them in a sentence each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from paper_figures._figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, save, with_table
from paper_figures.language_model.study import APPROXIMATE, MORE_TEXT, PERMUTED, RECIPES, Result

_COLORS = dict(zip(RECIPES, (GREY, BLACK, ORANGE, PURPLE, SKY, BLUE, GREEN, VERMILION), strict=True))
_PATTERNS = ("2:4", "4:8", "8:16", "16:32")
DIRECTIONS = {"both": "transposable", "rows": "one-sided"}

Found = dict[tuple[str, str, str], Result]


def draw(results: Sequence[Result], into: Path) -> None:
    """Write the figure as PNG and CSV, and the tables and answers on the page if that is there."""
    found = {(each.case.pattern, each.case.direction, each.case.recipe): each for each in results}
    rows = [_row(each) for each in results]
    save(perplexity_figure(found), rows, "perplexity", into, table=perplexity_table(found))
    page = into / "README.md"
    if page.exists():
        text = with_table(page.read_text(), "costs", costs(found))
        text = with_table(text, "orders", orders(found))
        page.write_text(with_table(text, "answers", answers(found)))


def _row(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "pattern": case.pattern,
        "direction": DIRECTIONS[case.direction] if case.pattern else "",
        "recipe": case.recipe,
        "perplexity": result.perplexity,
        "error": result.error,
        "seconds": result.seconds,
        "MiB": result.mebibytes,
    }


def perplexity_table(found: Found) -> list[dict[str, Any]]:
    """Perplexities, a row for each recipe and direction."""
    table = []
    for recipe in (*RECIPES, MORE_TEXT, *PERMUTED, *APPROXIMATE):
        for direction, words in DIRECTIONS.items():
            row: dict[str, Any] = {"masks": recipe, "direction": words}
            for pattern in _PATTERNS:
                mine = found.get((pattern, direction, recipe))
                row[pattern] = "-" if mine is None else f"{mine.perplexity:.4g}"
            if any(row[pattern] != "-" for pattern in _PATTERNS):
                table.append(row)
    return table


def costs(found: Found) -> list[dict[str, Any]]:
    """Time and memory of each recipe, over all patterns and directions."""
    table = []
    for recipe in (*RECIPES, MORE_TEXT, *PERMUTED, *APPROXIMATE):
        mine = [each for (_, _, name), each in found.items() if name == recipe]
        if mine:
            seconds, memory = [each.seconds for each in mine], [each.mebibytes for each in mine]
            row = {"masks": recipe, "seconds of one core": _range(seconds), "MiB": _range(memory)}
            table.append(row)
    return table or [{"masks": "-", "seconds of one core": "-", "MiB": "-"}]


def orders(found: Found) -> list[dict[str, Any]]:
    """Compare perplexity and errors where the free axes were reordered first with those where they were not."""
    table = []
    for (pattern, direction, recipe), each in found.items():
        plain = found.get((pattern, direction, PERMUTED.get(recipe, "")))
        if plain is not None:
            row = {"pattern": pattern, "masks": plain.case.recipe}
            row["perplexity"] = f"{plain.perplexity:.4g} -> {each.perplexity:.4g}"
            row["error of layers"] = f"{plain.error:.4f} -> {each.error:.4f}"
            table.append(row)
    table.sort(key=lambda row: (row["masks"], _PATTERNS.index(row["pattern"])))
    return table or [{"pattern": "-", "masks": "-", "perplexity": "-", "error of layers": "-"}]


def _range(values: Sequence[float]) -> str:
    low, high = round(min(values)), round(max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def perplexity_figure(found: Found) -> Figure:
    """Perplexity over that of the dense model by pattern, a panel for each direction."""
    figure = Figure(figsize=(14, 6))
    dense = found["", "both", "dense"].perplexity
    for axes, (direction, words) in zip(figure.subplots(1, 2, sharey=True), DIRECTIONS.items(), strict=True):
        for recipe, color in _COLORS.items():
            mine = [
                (place, found[pattern, direction, recipe].perplexity / dense)
                for place, pattern in enumerate(_PATTERNS)
                if (pattern, direction, recipe) in found
            ]
            axes.plot(*zip(*mine, strict=True) if mine else ([], []), "o-", color=color, label=recipe)
        axes.set_title(words)
        axes.set_yscale("log")
        axes.set_xticks(range(len(_PATTERNS)), _PATTERNS)
    figure.axes[0].set_ylabel("perplexity, times the dense model's")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def answers(found: Found) -> list[dict[str, Any]]:
    """Return the questions of the study, and what the results say."""
    dense = found["", "both", "dense"].perplexity
    rows = [{"question": "The dense model's perplexity", "answer": f"{dense:.4g}"}]
    for pattern, target in (("16:32", 1.35), ("2:4", 2.5)):
        mine = [each for (own, direction, _), each in found.items() if (own, direction) == (pattern, "both")]
        if mine:
            best = min(mine, key=lambda each: each.perplexity)
            times = best.perplexity / dense
            answer = f"{best.case.recipe}: {best.perplexity:.4g}, {times:.2f} times the dense model's (target {target})"
            rows.append({"question": f"The best transposable {pattern}", "answer": answer})
    prices = []
    for pattern in _PATTERNS:
        pairs = [
            found[pattern, "both", recipe].perplexity / found[pattern, "rows", recipe].perplexity
            for recipe in RECIPES
            if {(pattern, "both", recipe), (pattern, "rows", recipe)} <= found.keys()
            and recipe != "magnitude, no repair"
        ]
        if pairs:
            prices.append(f"{pattern} {min(pairs):.2f} to {max(pairs):.2f}")
    if prices:
        question = "The price of transposability: perplexity over that of one-sided masks by the same recipe, repaired"
        rows.append({"question": question, "answer": "; ".join(prices)})
    return rows
