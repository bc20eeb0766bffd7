"""The cost of ties, by the bits of the weights and by M: `python -m benchmarks.ties`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import OUTPUT, describe, header, pin_threads

_MS = (4, 8, 16, 32, 64)
_FAMILIES = ("gaussian", "bfloat16-valued", "int8-valued", "int4-valued", "int4-scaled", "ternary")
_SIDE = 1024


@dataclass(frozen=True)
class Cell:
    """One family of weights, solved for one pattern on one thread."""

    pattern: str
    family: str
    microseconds_per_tile: float


def main() -> None:
    """Measure every cell, print and save the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ties", description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the CSV and JSON files")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also put the table between the marks 'ties' of FILE"
    )
    arguments = parser.parse_args()
    pin_threads(1)

    from benchmarks import report
    from benchmarks.growth import measure_apart
    from benchmarks.marks import write_between_marks

    cases = [(m, 1, _SIDE, family) for m in _MS for family in _FAMILIES]
    cells = [
        Cell(cell.pattern, family, cell.nanoseconds_per_weight * m * m / 1e3)
        for (m, _, _, family), cell in zip(cases, measure_apart(cases), strict=True)
    ]
    text = f"{report.markdown(*table(cells))}\n\n{header(1)}"
    print(text)
    paths = report.save(arguments.output, "ties", describe(1), cells)
    if arguments.write:
        write_between_marks(arguments.write, "ties", text)
    print(f"\nwrote {', '.join(map(str, paths))}")


def table(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: microseconds per tile."""
    from benchmarks.report import significant

    found = {(cell.pattern, cell.family): significant(cell.microseconds_per_tile) for cell in cells}
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    families = list(dict.fromkeys(cell.family for cell in cells))
    return ["pattern", *families], [[pattern, *(found[pattern, family] for family in families)] for pattern in patterns]


if __name__ == "__main__":
    main()
