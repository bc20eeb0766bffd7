"""The cost of ties, by the bits of the weights and by M: `python -m benchmarks.ties`."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import OUTPUT, describe, header, pin_threads

_PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32), (32, 64))
_FAMILIES = ("gaussian", "bfloat16-valued", "int8-valued", "int4-valued", "int4-scaled", "ternary")
_SIDE = 1024
_REPEATS = 5


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
    from benchmarks.marks import write_between_marks

    cells = [cell for n, m in _PATTERNS for cell in measure(n, m)]
    text = f"{report.markdown(*table(cells))}\n\n{header(1)}"
    print(text)
    paths = report.save(arguments.output, "ties", describe(1), cells)
    if arguments.write:
        write_between_marks(arguments.write, "ties", text)
    print(f"\nwrote {', '.join(map(str, paths))}")


def measure(n: int, m: int, side: int = _SIDE) -> list[Cell]:
    """Every family, in turn, several times."""
    import masksolve as ms
    from benchmarks.families import random_matrix

    matrices = {family: random_matrix(family, side) for family in _FAMILIES}
    for matrix in matrices.values():  # compiles, or loads from the disk
        ms.solve_matrix(matrix[: 4 * m, : 4 * m], n, m, threads=1)
    seconds: dict[str, list[float]] = {family: [] for family in _FAMILIES}
    for _ in range(_REPEATS):
        for family, matrix in matrices.items():
            start = time.perf_counter()
            ms.solve_matrix(matrix, n, m, threads=1)
            seconds[family].append(time.perf_counter() - start)
    tiles = (side // m) ** 2
    return [Cell(f"{n}:{m}", family, statistics.median(times) / tiles * 1e6) for family, times in seconds.items()]


def table(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: microseconds per tile."""
    from benchmarks.report import significant

    found = {(cell.pattern, cell.family): significant(cell.microseconds_per_tile) for cell in cells}
    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    families = list(dict.fromkeys(cell.family for cell in cells))
    return ["pattern", *families], [[pattern, *(found[pattern, family] for family in families)] for pattern in patterns]


if __name__ == "__main__":
    main()
