"""The tables, the figures and the answers in one sentence each, from the results of all cases."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from paper_figures._figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, save, with_table
from paper_figures.adaprune import convnet, minilm

_COLORS = {"no repair": GREY, "mean absorbed": PURPLE, "bias only": ORANGE, "adam": SKY, "lstsq": BLUE}
_DIRECTIONS = {"both": "transposable", "rows": "one-sided"}
_PATTERNS = ("2:4", "4:8", "8:16", "16:32", "2:8")


def draw(results: Path, into: Path) -> None:
    """Write every figure as PNG and CSV, and the tables and answers on the page if that is there."""
    found, nets = minilm.read(results), convnet.read(results)
    grid = [each for each in found if _is_plain(each.case, found)]
    save(grid_figure(grid), [_row(each) for each in grid], "minilm", into, table=grid_table(grid))
    variants = variant_rows(found)
    save(variant_figure(variants), variants, "variants", into)
    images = image_rows(nets)
    save(image_figure(nets), images, "images", into)
    layers = layer_rows(nets)
    save(layer_figure(layers), layers, "conversion", into)
    page = into / "README.md"
    if page.exists():
        page.write_text(with_table(page.read_text(), "answers", answers(found, nets)))


def _of_all_sentences(case: minilm.Case, found: Sequence[minilm.Result]) -> minilm.Case:
    return replace(case, sentences=max(each.case.sentences for each in found))


def _is_plain(case: minilm.Case, found: Sequence[minilm.Result]) -> bool:
    """Whether a case is of the grid: with all sentences, and nothing varied."""
    plain = minilm.Case(case.pattern, case.direction, case.masks, case.repair)
    return case == _of_all_sentences(plain, found)


def _row(result: minilm.Result) -> dict[str, Any]:
    case = result.case
    return {
        "pattern": case.pattern,
        "direction": _DIRECTIONS[case.direction],
        "masks": case.masks,
        "repair": case.repair,
        "error": result.error,
        "cosine": result.cosine,
        "agreement": result.agreement,
        "seconds": result.seconds,
    }


def _find(found: Sequence[minilm.Result], case: minilm.Case) -> minilm.Result | None:
    return next((each for each in found if each.case == _of_all_sentences(case, found)), None)


def grid_table(grid: Sequence[minilm.Result]) -> list[dict[str, Any]]:
    """Cosine, and agreement of nearest neighbours in percent, of every repair beside each other."""
    table = []
    for pattern in _PATTERNS:
        for direction, words in _DIRECTIONS.items():
            for masks in ("magnitude", "wanda", "hessian"):
                row: dict[str, Any] = {"pattern": pattern, "direction": words, "masks": masks}
                for repair in minilm.REPAIRS:
                    mine = _find(grid, minilm.Case(pattern, direction, masks, repair))
                    row[repair] = "-" if mine is None else f"{mine.cosine:.3f}, {mine.agreement:.0%}"
                if any(row[repair] != "-" for repair in minilm.REPAIRS):
                    table.append(row)
    return table


def grid_figure(grid: Sequence[minilm.Result]) -> Figure:
    """Cosine of every pattern and direction, a panel for each kind of masks."""
    figure = Figure(figsize=(16, 7))
    scores = ("magnitude", "wanda", "hessian")
    kinds = [(pattern, direction) for pattern in _PATTERNS for direction in _DIRECTIONS]
    kinds = [kind for kind in kinds if any((each.case.pattern, each.case.direction) == kind for each in grid)]
    for axes, masks in zip(figure.subplots(1, 3, sharey=True), scores, strict=True):
        for repair, color in _COLORS.items():
            mine = [
                (place, each.cosine)
                for place, (pattern, direction) in enumerate(kinds)
                if (each := _find(grid, minilm.Case(pattern, direction, masks, repair))) is not None
            ]
            axes.plot(*zip(*mine, strict=True) if mine else ([], []), "o", color=color, label=repair)
        axes.set_title(f"masks by {masks}")
        axes.set_xticks(
            range(len(kinds)), [f"{pattern} {_DIRECTIONS[direction]}" for pattern, direction in kinds], rotation=90
        )
        axes.set_xlim(-0.5, len(kinds) - 0.5)
    figure.axes[0].set_ylabel("cosine between dense and pruned embeddings")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def variant_rows(found: Sequence[minilm.Result]) -> list[dict[str, Any]]:
    """Draw what varies one thing at a time: solver, order, alternation, number of sentences."""
    rows = []
    for each in found:
        case = each.case
        if case.repair not in ("adam", "lstsq") or (case.pattern, case.direction) != ("4:8", "both"):
            continue
        rows.append(
            {
                "masks": case.masks,
                "solver": case.repair,
                "sentences": case.sentences,
                "inputs from": "pruned model" if case.sequential else "dense model",
                "alternations": case.alternations,
                "error": each.error,
                "cosine": each.cosine,
                "agreement": each.agreement,
                "seconds": each.seconds,
            }
        )
    return sorted(rows, key=lambda row: tuple(row.values()))


def variant_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Cosine against the number of sentences, and every other variant beside."""
    figure = Figure(figsize=(13, 5.5))
    left, right = figure.subplots(1, 2, sharey=True)
    plain = [
        row
        for row in rows
        if (row["masks"], row["solver"], row["inputs from"], row["alternations"])
        == ("magnitude", "lstsq", "dense model", 0)
    ]
    left.plot([row["sentences"] for row in plain], [row["cosine"] for row in plain], "o-", color=BLUE)
    left.set_xscale("log", base=2)
    left.set_xlabel("calibration sentences")
    left.set_ylabel("cosine between dense and pruned embeddings")
    left.set_title("lstsq, masks by magnitude")
    most = max((row["sentences"] for row in rows), default=0)
    colors = {"magnitude": BLUE, "wanda": VERMILION, "hessian": GREEN}
    names: dict[str, int] = {}
    for row in (row for row in rows if row["sentences"] == most):
        name = row["solver"]
        name += ", sequential" if row["inputs from"] == "pruned model" else ""
        name += ", alternating" if row["alternations"] else ""
        right.plot(names.setdefault(name, len(names)), row["cosine"], "o", color=colors[row["masks"]])
    for masks, color in colors.items():
        right.plot([], [], "o", color=color, label=masks)
    right.set_xticks(range(len(names)), list(names), rotation=20, ha="right")
    right.legend(loc="lower right")
    right.set_title("transposable 4:8")
    return figure


def image_rows(nets: Sequence[convnet.Result]) -> list[dict[str, Any]]:
    """Accuracies in percent, a row for each start and repair, a column for each number of images."""
    counts = sorted({each.case.images for each in nets})
    rows = []
    for start, direction, repair in sorted(
        {(each.case.sparsity, each.case.direction, each.case.repair) for each in nets}
    ):
        mine = {
            each.case.images: each
            for each in nets
            if (each.case.sparsity, each.case.direction, each.case.repair) == (start, direction, repair)
        }
        some = next(iter(mine.values()))
        row: dict[str, Any] = {
            "start": f"{start:.0%} zeros" if start else "dense",
            "its accuracy": f"{some.start:.2%}",
            "direction": _DIRECTIONS[direction],
            "repair": repair,
        }
        alone = repair == "masks alone"
        row.update(
            {
                f"{count} image{'s' * (count > 1)}": f"{some.accuracy if alone else mine[count].accuracy:.2%}"
                if alone or count in mine
                else "-"
                for count in counts
            }
        )
        rows.append(row)
    return rows


def image_figure(nets: Sequence[convnet.Result]) -> Figure:
    """Accuracy against the number of images."""
    figure = Figure(figsize=(14, 5.5))
    left, right = figure.subplots(1, 2)
    curves = {"batch norm only": ORANGE, "lstsq, batch norm as it was": PURPLE, "lstsq": BLUE}
    for repair, color in curves.items():
        mine = sorted(
            (each.case.images, 100 * each.accuracy)
            for each in nets
            if (each.case.sparsity, each.case.direction, each.case.repair) == (0.0, "both", repair)
        )
        left.plot(*zip(*mine, strict=True) if mine else ([], []), "o-", color=color, label=repair)
    for each in nets:
        if (each.case.sparsity, each.case.direction, each.case.repair) == (0.0, "both", "masks alone"):
            left.axhline(100 * each.accuracy, color=GREY, linestyle=":", label="masks alone")
            left.axhline(100 * each.start, color=BLACK, linestyle="--", label="dense")
    left.set_title("dense to transposable 4:8")
    left.set_ylabel("test accuracy, %")
    for sparsity, color in zip(sorted({each.case.sparsity for each in nets} - {0.0}), _COLORS.values(), strict=False):
        mine = sorted(
            (each.case.images, 100 * each.accuracy)
            for each in nets
            if (each.case.sparsity, each.case.repair) == (sparsity, "lstsq")
        )
        right.plot(*zip(*mine, strict=True) if mine else ([], []), "o-", color=color, label=f"{sparsity:.0%} zeros")
        alone = [each for each in nets if (each.case.sparsity, each.case.repair) == (sparsity, "masks alone")]
        if alone:
            right.axhline(100 * alone[0].accuracy, color=color, linestyle=":")
    right.set_title("unstructured to transposable N:8 (dotted: masks alone)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("calibration images")
        axes.legend(loc="center right", fontsize=11)
    return figure


def layer_rows(nets: Sequence[convnet.Result]) -> list[dict[str, Any]]:
    """Every layer of the models that had zeros."""
    rows = []
    for sparsity in sorted({each.case.sparsity for each in nets} - {0.0}):
        mine = next(each for each in nets if each.case.sparsity == sparsity and each.case.repair == "masks alone")
        rows += [
            {
                "all zeros": f"{sparsity:.0%}",
                "layer": layer.name.removesuffix(".weight"),
                "its zeros": layer.sparsity,
                "pattern": layer.pattern,
                "tiles that fit": layer.fitting,
                "odds": layer.odds,
                "weights touched": layer.touched,
                "of": layer.weights,
            }
            for layer in mine.layers
        ]
    return rows


def layer_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the share of tiles that fit already against its odds."""
    figure = Figure(figsize=(7, 6))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    colors = dict(zip(sorted({row["all zeros"] for row in rows}), (ORANGE, SKY, GREEN, VERMILION), strict=False))
    for zeros, color in colors.items():
        mine = [row for row in rows if row["all zeros"] == zeros]
        axes.plot(
            [row["odds"] for row in mine],
            [row["tiles that fit"] for row in mine],
            "o",
            color=color,
            label=f"{zeros} zeros",
        )
    axes.set_xlabel("odds, were the zeros independent")
    axes.set_ylabel("share of the tiles that fit already")
    axes.legend(loc="upper left")
    return figure


def answers(found: Sequence[minilm.Result], nets: Sequence[convnet.Result]) -> list[dict[str, str]]:
    """One sentence for each question, from the numbers."""

    def cosine(direction: str, repair: str) -> float | None:
        mine = _find(found, minilm.Case("4:8", direction, "magnitude", repair))
        return None if mine is None else mine.cosine

    said = []
    alone, repaired, sided = cosine("both", "no repair"), cosine("both", "lstsq"), cosine("rows", "lstsq")
    if alone is not None and repaired is not None:
        said.append(
            (
                "What does repair gain over masks alone?",
                f"At transposable 4:8 by magnitude the cosine of MiniLM's embeddings rises from {alone:.3f} to "
                f"{repaired:.3f}"
                + _by_accuracy(nets, (0.0, "both", "masks alone"), (0.0, "both", "lstsq"), "the convnet's accuracy"),
            )
        )
    if repaired is not None and sided is not None:
        said.append(
            (
                "What does transposable cost over one-sided, after repair?",
                f"At 4:8 by magnitude {sided - repaired:.3f} of the cosine ({sided:.3f} one-sided)"
                + _by_accuracy(nets, (0.0, "rows", "lstsq"), (0.0, "both", "lstsq"), "the convnet's accuracy"),
            )
        )
    counts = sorted(
        (each.case.sentences, each.cosine)
        for each in found
        if each.case == minilm.Case("4:8", "both", "magnitude", "lstsq", sentences=each.case.sentences)
    )
    if len(counts) > 1:
        told = ", ".join(f"{cosine:.3f} with {count}" for count, cosine in counts)
        images = ", ".join(
            f"{each.accuracy:.2%} with {each.case.images}"
            for each in sorted(nets, key=lambda each: each.case.images)
            if (each.case.sparsity, each.case.direction, each.case.repair) == (0.0, "both", "lstsq")
        )
        said.append(("How much calibration is enough?", f"Sentences: {told}. Images: {images}."))
    pairs = [
        (one, other)
        for one in found
        if one.case.repair == "adam"
        and (other := _find(found, minilm.Case(one.case.pattern, one.case.direction, one.case.masks, "lstsq")))
    ]
    if pairs:
        errors = statistics.median(one.error / other.error for one, other in pairs)
        seconds = statistics.median(one.seconds / other.seconds for one, other in pairs)
        cosines = statistics.median(other.cosine - one.cosine for one, other in pairs)
        said.append(
            (
                "Adam or least squares?",
                f"Adam leaves {errors:.2f} times the error of least squares and {cosines:.3f} less of the cosine, in "
                f"{seconds:.1f} times the seconds (medians of {len(pairs)} pairs of pattern, direction and masks).",
            )
        )
    plain = {masks: minilm.Case("4:8", "both", masks, "lstsq") for masks in ("magnitude", "wanda", "hessian")}
    for question, pairs_of_cases in (
        (
            "What do other scores gain over magnitude, after repair?",
            {masks: (plain["magnitude"], plain[masks]) for masks in ("wanda", "hessian")},
        ),
        (
            "Does it help to find the masks again from the repaired weights?",
            {masks: (case, replace(case, alternations=5)) for masks, case in plain.items()},
        ),
        (
            "Does it help to take inputs from the pruned model?",
            {masks: (case, replace(case, sequential=True)) for masks, case in plain.items()},
        ),
    ):
        changes = [
            f"{masks}: error {one.error:.4f} to {other.error:.4f}, cosine {one.cosine:.3f} to {other.cosine:.3f}"
            for masks, (before, after) in pairs_of_cases.items()
            if (one := _find(found, before)) is not None and (other := _find(found, after)) is not None
        ]
        if changes:
            said.append((question, f"At transposable 4:8, {'; '.join(changes)}."))
    return [{"question": question, "answer": answer} for question, answer in said]


def _by_accuracy(
    nets: Sequence[convnet.Result], before: tuple[float, str, str], after: tuple[float, str, str], what: str
) -> str:
    """Return the end of a sentence: two accuracies at 100 images, if both are there."""
    values = [
        next(
            (
                each.accuracy
                for each in nets
                if (each.case.sparsity, each.case.direction, each.case.repair) == kind
                and (each.case.images == 100 or kind[2] == "masks alone")
            ),
            None,
        )
        for kind in (before, after)
    ]
    if values[0] is None or values[1] is None:
        return "."
    return f"; {what} goes from {values[0]:.2%} to {values[1]:.2%} (100 images)."
