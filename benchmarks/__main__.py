"""The benchmark, every solver, pattern and family of weights in one table: `python -m benchmarks --quick`."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import OUTPUT, WEIGHTS, describe, header, pin_threads


def main() -> None:
    """Parse the arguments, pin the threads, and only then import what reads them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="under two minutes on two cores (the default)")
    length.add_argument("--full", action="store_true", help="4096x4096 matrices, slower solvers on more tiles")
    parser.add_argument("--threads", type=int, default=1, help="threads for every solver that can use them (1)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="safetensors file with the real matrices")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the CSV, JSON and PNG files")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="also put the table between the marks 'bench' of FILE, and the figure beside this program",
    )
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    run(arguments.full, arguments.threads, arguments.weights, arguments.output, arguments.write)


def run(full: bool, threads: int, weights: Path, output: Path, page: Path | None) -> None:
    """Measure, print, save."""
    from benchmarks import families, report
    from benchmarks.marks import write_between_marks
    from benchmarks.measure import Effort, judge, measure
    from benchmarks.solvers import every_solver
    from benchmarks.tiling import PATTERNS

    start = time.perf_counter()
    effort = Effort(0.5, 5, 1 << 17) if full else Effort(0.02, 3, 1 << 12)
    size = 4096 if full else 2048
    solvers, notes = every_solver(threads)
    matrices = {name: families.random_matrix(name, size) for name in families.RANDOM}
    if weights.exists():
        matrices["minilm"] = families.encoder_as_one(weights)
    else:
        notes.append(f"minilm: skipped, there is no {weights}")

    rows = []
    for n, m in PATTERNS:
        for family, matrix in matrices.items():
            print(f"measuring: {n}:{m}, {family}", file=sys.stderr, flush=True)
            runs = measure(solvers, matrix, n, m, effort, threads)
            rows += sorted((judge(each, n, m, family, effort) for each in runs), key=lambda r: r.microseconds_per_tile)

    notes += [f"{each.name}: {each.note}" for each in solvers]
    notes += [
        f"random matrices {size}x{size}; medians of {effort.repeats}, solvers in turn, each on the tiles that it "
        f"solves in about {effort.seconds} s",
        "the paper's greedy and TSENOR want more tiles at once than the quick form gives them at 16:32: up to 2.4 "
        "times faster in the full form",
        "exact, greedy, two-approx and numpy.abs take the matrix, the others contiguous tiles cut for them beforehand",
        "retained: kept importance of a tile over the optimum's; certified: by masksolve.certify, (tiles judged)",
    ]
    table = report.measured_table(rows)
    print(f"{header(threads)}\n\n{table}\n\n" + "\n".join(notes))
    facts = {**describe(threads), "notes": notes}
    paths = report.save(output, "benchmark", facts, rows)
    figure = output / "time_per_tile.png"
    paths += _draw(rows, solvers, threads, figure)
    if page is not None:
        summary = report.markdown(*report.summary(rows, "gaussian"))
        listed = "\n".join(f"- {note}" for note in notes)
        write_between_marks(page, "bench", f"{summary}\n\n{listed}\n\n{header(threads)}\n\n```text\n{table}\n```")
        if figure in paths:
            shutil.copy(figure, Path(__file__).with_name(figure.name))
    print(f"\nwrote {', '.join(map(str, paths))} after {time.perf_counter() - start:.0f} s")


def _draw(rows: list[Any], solvers: list[Any], threads: int, path: Path) -> list[Path]:
    try:
        from benchmarks import figures
    except ImportError as error:
        print(f"no figure: {error}")
        return []
    title = f"Time for one tile, Gaussian float32 weights, {threads} thread{'s' if threads > 1 else ''}"
    figures.time_per_tile(rows, solvers, title, path)
    return [path]


if __name__ == "__main__":
    main()
