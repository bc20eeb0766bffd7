"""Reports as pages: of a prune, of a comparison, and of AdaPrune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from masksolve._words import one_sided
from masksolve.checkpoint._compare import Comparison, TensorComparison
from masksolve.checkpoint._html import Cell, bars, document, headline, section, shape_of, table
from masksolve.checkpoint._report import PrunedTensor, PruneReport, WorstTile

if TYPE_CHECKING:
    from masksolve.checkpoint._adaprune import CheckpointAdaPruneReport
    from masksolve.torch import AdaPruneReport

_GAP_LABELS = ("0, proven optimal", "up to 0.01 %", "up to 0.1 %", "up to 1 %", "up to 10 %", "more than 10 %")


def page(report: PruneReport | Comparison | AdaPruneReport | CheckpointAdaPruneReport) -> str:
    """Return a report as HTML: one page that loads nothing else, whose tables can be sorted and filtered.

    Parameters
    ----------
    report : PruneReport, Comparison, masksolve.torch.AdaPruneReport or CheckpointAdaPruneReport
        What `prune_checkpoint` or `apply_masks`, `compare_checkpoints`, `masksolve.torch.adaprune` or
        `adaprune_checkpoint` returned.

    Returns
    -------
    str

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> from masksolve.checkpoint import prune_checkpoint
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = Path(folder.name, "in.safetensors"), Path(folder.name, "out.safetensors")
    >>> save_file({"w": np.arange(64.0).reshape(8, 8)}, source)
    >>> page(prune_checkpoint(source, target, "2:4")).startswith("<!doctype html>")
    True
    >>> folder.cleanup()
    """
    if isinstance(report, PruneReport):
        return _of_prune(report)
    if isinstance(report, Comparison):
        return _of_comparison(report)
    # That of a folder has the memory beside it.
    layers: AdaPruneReport = getattr(report, "report", report)  # type: ignore[arg-type]
    return _of_adaprune(layers)


def _of_prune(report: PruneReport) -> str:
    target = report.output or report.masks or ""
    proof = "every tile is proven optimal" if report.optimal else "not every tile is optimal"
    title = " and ".join(f"{pattern}{one_sided(direction)}" for pattern, direction in report.goals)
    goals = [
        f"{pattern.describe()}, {'transposable' if direction == 'both' else f'one-sided, along {direction} only'}"
        for pattern, direction in report.goals
    ]
    weights = sum(math.prod(tensor.shape) for tensor in report.tensors)
    parts = [
        f"<h1>{escape(target)}</h1>",
        f"<p class=note>{escape('; '.join(goals))}; {proof}</p>",
        f"<p class=note>Tensors were identified by {escape(report.identified_by)}.</p>",
        headline(
            {
                "mean kept importance": f"{report.mean_kept_importance:.2%}",
                "tensors pruned": f"{len(report.tensors):,}",
                "weights in them": f"{weights:,}",
                "tensors passed through": f"{len(report.skipped):,}",
                "time of this run": f"{report.seconds:,.1f} s",
            }
        ),
        section(
            "Kept importance per tensor",
            "The sum of |weights| that is kept, as a share of all, in the order of the checkpoint.",
        ),
        _kept_chart([(tensor.name, tensor.kept_importance) for tensor in report.tensors]),
        section(
            "Gaps of the certificates",
            "How far a tile may be from the best that any mask keeps; bars grow with the logarithm.",
        ),
        _gap_chart([sum(counts) for counts in zip(*(tensor.tile_gaps for tensor in report.tensors), strict=True)]),
        section(
            "The worst tiles",
            "Those with the largest gaps and, among equals, those that lose the largest share of their importance. "
            "The darker, the larger the weight; what is kept is framed.",
        ),
        "<div class=tiles>" + "".join(map(_tile, report.worst_tiles)) + "</div>",
        section("Pruned tensors"),
        table(
            ["tensor", "dtype", "shape", "pattern", "density", "kept importance", "gap", "solving", "certifying"],
            [_pruned_row(tensor) for tensor in report.tensors],
            numbers=5,
        ),
        section("Tensors passed through"),
        table(
            ["tensor", "dtype", "shape", "reason"],
            [[tensor.name, tensor.dtype, shape_of(tensor.shape), tensor.reason] for tensor in report.skipped],
        ),
        section("Run it again"),
        f"<p><code>{escape(report.command)}</code></p>",
        table(["what", "which"], [*report.versions.items(), ("hash of the input (xxh3_128)", report.input_hash)]),
    ]
    return document(f"{target}, {title}", parts)


def _pruned_row(tensor: PrunedTensor) -> list[Cell]:
    pattern = tensor.pattern
    return [
        tensor.name,
        tensor.dtype,
        (shape_of(tensor.shape), math.prod(tensor.shape)),
        f"{pattern}{one_sided(tensor.direction)}",
        _share(pattern.n / pattern.m),
        _share(tensor.kept_importance),
        ("0 (optimal)" if tensor.optimal else f"{tensor.gap:.2e}", tensor.gap),
        _seconds(tensor.solve_seconds),
        _seconds(tensor.certify_seconds),
    ]


def _of_comparison(report: Comparison) -> str:
    changed = [tensor for tensor in report.tensors if not tensor.is_same]
    parts = [
        "<h1>Two checkpoints</h1>",
        headline(
            {
                "tensors that differ": f"{len(changed):,}",
                "tensors in all": f"{len(report.tensors):,}",
                "entries made zero": f"{sum(tensor.zeroed for tensor in changed):,}",
                "files beside them that differ": f"{len(report.files):,}",
            }
        ),
        section("Importance that the second keeps", "The sum of |weights| as a share of the first's."),
        _kept_chart([(each.name, _kept(each)) for each in changed if each.importance[0] > 0]),
        section("Tensors that differ"),
        table(
            ["tensor", "difference", "changed", "made zero", "zeros before", "zeros after", "importance kept"],
            [_compared_row(tensor) for tensor in changed],
            numbers=5,
        ),
        section("Other files"),
        "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in report.files or ["all are the same"]) + "</ul>",
    ]
    return document("Two checkpoints", parts)


def _kept(tensor: TensorComparison) -> float:
    before, after = tensor.importance
    return after / before if before > 0 else 1.0


def _compared_row(tensor: TensorComparison) -> list[Cell]:
    if tensor.difference is not None:
        return [tensor.name, tensor.difference, "", "", "", "", ""]
    counts = (tensor.changed, tensor.zeroed, *tensor.zeros)
    kept = _share(_kept(tensor)) if tensor.importance[0] > 0 else ""
    return [tensor.name, "values", *(_share(count / tensor.entries) for count in counts), kept]


def _of_adaprune(report: AdaPruneReport) -> str:
    layers = report.layers
    before = sum(layer.error_before for layer in layers) / max(1, len(layers))
    after = sum(layer.error_after for layer in layers) / max(1, len(layers))
    parts = [
        f"<h1>AdaPrune{escape(one_sided(report.direction))}</h1>",
        headline(
            {
                "layers pruned": f"{len(layers):,}",
                "mean error before the repair": f"{before:.2%}",
                "mean error after it": f"{after:.2%}",
                "parameters skipped": f"{len(report.skipped):,}",
                "time of this run": f"{report.seconds:,.1f} s",
            }
        ),
        section(
            "Errors per layer",
            "The relative squared error of a layer's output on the calibration inputs: pale before the repair, dark "
            "after it, as shares of the largest.",
        ),
        _error_chart([(layer.name, layer.error_before, layer.error_after) for layer in layers]),
        section("Kept importance per layer", "The share of the importance that the layer's mask keeps."),
        _kept_chart([(layer.name, layer.kept_importance) for layer in layers]),
        section("Pruned layers"),
        table(
            ["layer", "shape", "pattern", "density", "kept importance", "error before", "error after", "time"],
            [
                [
                    layer.name,
                    (shape_of(layer.shape), math.prod(layer.shape)),
                    str(layer.pattern),
                    _share(layer.pattern.n / layer.pattern.m),
                    _share(layer.kept_importance),
                    _share(layer.error_before),
                    _share(layer.error_after),
                    _seconds(layer.seconds),
                ]
                for layer in layers
            ],
            numbers=5,
        ),
    ]
    if report.blocks:
        parts += [
            section("Refined blocks", "Errors of a block's output on batches that were held out."),
            table(
                ["block", "error before", "error after", "time"],
                [
                    [each.name, _share(each.error_before), _share(each.error_after), _seconds(each.seconds)]
                    for each in report.blocks
                ],
                numbers=3,
            ),
        ]
    parts += [
        section("Skipped parameters"),
        table(
            ["parameter", "shape", "reason"],
            [[each.name, shape_of(each.shape), each.reason or ""] for each in report.skipped],
        ),
    ]
    return document("AdaPrune", parts)


def _share(value: float) -> Cell:
    return f"{value:.2%}", value


def _seconds(value: float) -> Cell:
    return f"{value:.2f} s", value


def _error_chart(layers: Sequence[tuple[str, float, float]]) -> str:
    largest = max((before for _, before, _ in layers), default=0.0) or 1.0
    rows = []
    for name, before, after in layers:
        rows.append((name, before / largest, f"{before:.2%}", "pale"))
        rows.append(("", after / largest, f"{after:.2%}", "bar"))
    return bars(rows, "error of each layer before and after the repair")


def _kept_chart(shares: Sequence[tuple[str, float]]) -> str:
    rows = [(name, min(kept, 1.0), f"{kept:.2%}", "bar") for name, kept in shares]
    return bars(rows, "kept importance of each tensor")


def _gap_chart(counts: Sequence[int]) -> str:
    longest = math.log10(max(counts) + 1)
    classes = ["good", "bar", "bar", "bar", "bad", "bad"]
    rows = [
        (label, math.log10(count + 1) / longest if count else 0.0, f"{count:,} tiles", kind)
        for label, count, kind in zip(_GAP_LABELS, counts, classes, strict=True)
    ]
    return bars(rows, "number of tiles by the gap of their certificate")


def _tile(worst: WorstTile) -> str:
    tile = worst.tile
    size = max(len(tile.mask), len(tile.mask[0]))
    step = 200 / size
    largest = max(abs(weight) for row in worst.weights for weight in row) or 1.0
    cells = []
    for i, (row, line) in enumerate(zip(worst.weights, tile.mask, strict=True)):
        for j, (weight, kept) in enumerate(zip(row, line, strict=True)):
            frame = " kept" if kept == "1" else ""
            cells.append(
                f"<rect class='cell{frame}' x={j * step + 1:.2f} y={i * step + 1:.2f} width={step - 2:.2f} "
                f"height={step - 2:.2f} fill-opacity={abs(weight) / largest:.3f}><title>{weight:.6g}</title></rect>"
            )
    share = tile.kept / tile.importance if tile.importance > 0 else 1.0
    where = f", matrix {', '.join(map(str, tile.matrix))}" if tile.matrix else ""
    return (
        f"<figure><svg viewBox='0 0 200 200' width=200 role=img aria-label='a tile'>{''.join(cells)}</svg>"
        f"<figcaption>{escape(worst.tensor)}<br>row {tile.row}, column {tile.column}{where}<br>"
        f"keeps {share:.2%}, gap {tile.gap:.2e}</figcaption></figure>"
    )
