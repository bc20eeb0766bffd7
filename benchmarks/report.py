"""Writes tables: aligned text for the terminal, markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

_COLUMNS = (
    "pattern",
    "weights",
    "solver",
    "µs/tile",
    "weights/s",
    "retained mean",
    "worst tile",
    "invalid",
    "unfilled",
    "certified",
    "tiles timed",
)


def measured_table(rows: Sequence[Row]) -> str:
    """Return the whole table, fastest solver first within a pattern and a family of weights."""
    return aligned(_COLUMNS, [_cells(row) for row in rows])


def summary(rows: Sequence[Row], weights: str) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and lines: microseconds per tile of each solver and pattern, and the share kept if not all of it."""
    some = [row for row in rows if row.weights == weights]
    patterns = list(dict.fromkeys(row.pattern for row in some))
    cells = {(row.solver, row.pattern): row for row in some}
    lines = []
    for solver in dict.fromkeys(row.solver for row in some):
        line = [solver]
        for pattern in patterns:
            row = cells.get((solver, pattern))
            line.append("-" if row is None else _time_and_share(row))
        lines.append(line)
    return ["µs per tile", *patterns], lines


def _time_and_share(row: Row) -> str:
    time = significant(row.microseconds_per_tile)
    share = row.retained_mean
    return time if share is None or f"{share:.4f}" == "1.0000" else f"{time} ({share:.4f})"


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table's columns, numbers to the right; a line before each change of the first two columns."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [_line(columns, widths), "  ".join("-" * width for width in widths)]
    for previous, row in zip([rows[0], *rows], rows, strict=False):
        if tuple(previous[:2]) != tuple(row[:2]) and len(columns) == len(_COLUMNS):
            lines.append("")
        lines.append(_line(row, widths))
    return "\n".join(lines)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows))


def significant(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    return f"{float(f'{value:.3g}'):,.10f}".rstrip("0").rstrip(".")


def save(folder: Path, name: str, header: Mapping[str, Any], rows: Sequence[Any]) -> list[Path]:
    """Rows (dataclasses) as folder/name.csv and, with the header, folder/name.json; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [asdict(row) for row in rows]
    table, document = folder / f"{name}.csv", folder / f"{name}.json"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    document.write_text(json.dumps({**header, "rows": records}, indent=1), encoding="utf-8")
    return [table, document]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.ljust(width) if i < 3 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def _cells(row: Row) -> list[str]:
    return [
        row.pattern,
        row.weights,
        row.solver,
        significant(row.microseconds_per_tile),
        f"{row.weights_per_second:.2e}",
        _ratio(row.retained_mean),
        _ratio(row.retained_worst),
        _percent(row.invalid),
        _percent(row.unfilled),
        f"{row.certified} ({row.certified_tiles})" if row.certified else "-",
        f"{row.tiles:,}",
    ]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
