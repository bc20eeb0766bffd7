"""The report of a prune as one self-contained HTML page: charts as inline SVG, no script, nothing from a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from masksolve._words import one_sided
from masksolve.checkpoint._report import PrunedTensor, PruneReport, WorstTile

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #6a737d; --line: #d8dee4; --bar: #2f6fba; --rest: #e7ebef;
  --good: #2e8540; --bad: #b5352c; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #9aa4ae; --line: #3a424a; --bar: #6aa5e8;
  --rest: #2a3138; --good: #63b874; --bad: #e5766d; --paper: #15191d; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.note { color: var(--faint); margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.bar { fill: var(--bar); } .rest { fill: var(--rest); } .good { fill: var(--good); } .bad { fill: var(--bad); }
.numbers { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; } .numbers b { display: block;
  font-size: 1.5rem; } .numbers span { color: var(--faint); }
.tiles { display: flex; flex-wrap: wrap; gap: 1.2rem; } figure { margin: 0; width: 13rem; } figcaption {
  font-size: .8rem; overflow-wrap: anywhere; }
.kept { stroke: var(--bar); stroke-width: 1.5; } .cell { fill: var(--ink); }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""
_GAP_LABELS = ("0, proven optimal", "up to 0.01 %", "up to 0.1 %", "up to 1 %", "up to 10 %", "more than 10 %")


def page(report: PruneReport) -> str:
    """Return the report as HTML: one page that loads nothing else.

    Parameters
    ----------
    report : PruneReport
        What `prune_checkpoint` or `apply_masks` returned.

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
    target = report.output or report.masks or ""
    proof = "every tile is proven optimal" if report.optimal else "not every tile is optimal"
    title = " and ".join(f"{pattern}{one_sided(direction)}" for pattern, direction in report.goals)
    goals = [
        f"{pattern.describe()}, {'transposable' if direction == 'both' else f'one-sided, along {direction} only'}"
        for pattern, direction in report.goals
    ]
    weights = sum(math.prod(tensor.shape) for tensor in report.tensors)
    parts = [
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>{escape(target)}, {title}</title>",
        f"<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(target)}</h1>",
        f"<p class=note>{escape('; '.join(goals))}; {proof}</p>",
        f"<p class=note>Tensors were identified by {escape(report.identified_by)}.</p>",
        _numbers(
            {
                "mean kept importance": f"{report.mean_kept_importance:.2%}",
                "tensors pruned": f"{len(report.tensors):,}",
                "weights in them": f"{weights:,}",
                "tensors passed through": f"{len(report.skipped):,}",
                "time of this run": f"{report.seconds:,.1f} s",
            }
        ),
        "<h2>Kept importance per tensor</h2>",
        "<p class=note>The sum of |weights| that is kept, as a share of all, in the order of the checkpoint.</p>",
        _kept_chart(report.tensors),
        "<h2>Gaps of the certificates</h2>",
        "<p class=note>How far a tile may be from the best that any mask keeps; bars grow with the logarithm.</p>",
        _gap_chart([sum(counts) for counts in zip(*(tensor.tile_gaps for tensor in report.tensors), strict=True)]),
        "<h2>The worst tiles</h2>",
        "<p class=note>Those with the largest gaps and, among equals, those that lose the largest share of their "
        "importance. The darker, the larger the weight; what is kept is framed.</p>",
        "<div class=tiles>" + "".join(map(_tile, report.worst_tiles)) + "</div>",
        "<h2>Pruned tensors</h2>",
        _table(
            ["tensor", "dtype", "shape", "kept importance", "gap", "solving", "certifying"],
            [
                [
                    tensor.name,
                    tensor.dtype,
                    _shape(tensor.shape),
                    f"{tensor.kept_importance:.2%}",
                    "0 (optimal)" if tensor.optimal else f"{tensor.gap:.2e}",
                    f"{tensor.solve_seconds:.2f} s",
                    f"{tensor.certify_seconds:.2f} s",
                ]
                for tensor in report.tensors
            ],
            numbers=4,
        ),
        "<h2>Tensors passed through</h2>",
        _table(
            ["tensor", "dtype", "shape", "reason"],
            [[tensor.name, tensor.dtype, _shape(tensor.shape), tensor.reason] for tensor in report.skipped],
        ),
        "<h2>Run it again</h2>",
        f"<p><code>{escape(report.command)}</code></p>",
        _table(["what", "which"], [*report.versions.items(), ("hash of the input (xxh3_128)", report.input_hash)]),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _numbers(numbers: dict[str, str]) -> str:
    items = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in numbers.items())
    return f"<div class=numbers>{items}</div>"


def _kept_chart(tensors: Sequence[PrunedTensor]) -> str:
    rows = [(tensor.name, tensor.kept_importance, f"{tensor.kept_importance:.2%}", "bar") for tensor in tensors]
    return _bars(rows, "kept importance of each pruned tensor")


def _gap_chart(counts: Sequence[int]) -> str:
    longest = math.log10(max(counts) + 1)
    classes = ["good", "bar", "bar", "bar", "bad", "bad"]
    rows = [
        (label, math.log10(count + 1) / longest if count else 0.0, f"{count:,} tiles", kind)
        for label, count, kind in zip(_GAP_LABELS, counts, classes, strict=True)
    ]
    return _bars(rows, "number of tiles by the gap of their certificate")


def _bars(rows: Iterable[tuple[str, float, str, str]], title: str) -> str:
    """Draw horizontal bars from rows of label, length as a share, value in words, class."""
    lines = []
    y = 0
    for label, share, value, kind in rows:
        short = label if len(label) <= 46 else f"…{label[-45:]}"
        lines.append(
            f"<g><title>{escape(label)}: {escape(value)}</title>"
            f"<text x=310 y={y + 13} text-anchor=end>{escape(short)}</text>"
            f"<rect class=rest x=320 y={y + 2} width=420 height=14 /><rect class={kind} x=320 y={y + 2} "
            f"width={420 * share:.1f} height=14 /><text x=750 y={y + 13}>{escape(value)}</text></g>"
        )
        y += 20
    return f"<svg viewBox='0 0 880 {y}' width=880 role=img aria-label='{escape(title)}'>{''.join(lines)}</svg>"


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


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 0) -> str:
    """Return a table whose last columns are numbers."""
    first = len(headings) - numbers

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if index >= first else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line(headings, 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
