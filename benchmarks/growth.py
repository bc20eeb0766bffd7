"""How time and memory grow with the matrix, with M and with threads: `python -m benchmarks.growth --quick|--full`."""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import OUTPUT, describe, header, pin_threads
from masksolve._cores import usable_cores

PICTURE = Path(__file__).with_name("growth.png")
_SIDES = (256, 512, 1024, 2048, 4096, 8192, 16384)
_QUICK_LARGEST = 4096
_MS = (4, 8, 12, 16, 24, 32, 48, 64)
_REPEATS = 3


@dataclass(frozen=True)
class Cell:
    """One matrix, cut to a multiple of M, solved for N = M/2; `peak_bytes` is beyond the matrix and its mask."""

    pattern: str
    m: int
    threads: int
    side: int
    seconds: float
    nanoseconds_per_weight: float
    peak_bytes: int | None


def main() -> None:
    """Measure every cell, print and save the table and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help=f"up to {_QUICK_LARGEST}² (the default)")
    length.add_argument("--full", action="store_true", help=f"up to {_SIDES[-1]}²")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the CSV, JSON and PNG files")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="also put a summary between the marks 'growth' of FILE, and the figure beside this program",
    )
    arguments = parser.parse_args()
    pin_threads(1)

    from benchmarks import report
    from benchmarks.marks import write_between_marks

    sides = [side for side in _SIDES if arguments.full or side <= _QUICK_LARGEST]
    threads = [count for count in (1, 2) if count <= usable_cores()]
    print(header(max(threads)) + "\n", flush=True)
    cells = measure_all(sides, threads)
    print(report.markdown(*table(cells)))
    paths = report.save(arguments.output, "growth", describe(max(threads)), cells)
    paths += _draw(cells, arguments.output / "growth.png")
    if arguments.write:
        text = f"{report.markdown(*summary(cells))}\n\n{header(max(threads))}"
        write_between_marks(arguments.write, "growth", text)
        shutil.copy(arguments.output / "growth.png", PICTURE)
    print(f"\nwrote {', '.join(map(str, paths))}")


def measure_all(sides: Sequence[int], threads: Sequence[int]) -> list[Cell]:
    """Every M, number of threads and size."""
    return measure_apart([(m, count, side, "gaussian") for m in _MS for count in threads for side in sides])


def measure_apart(cases: Sequence[tuple[int, int, int, str]]) -> list[Cell]:
    """`measure` of each case in a process of its own, so that none finds memory that another left free."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(measure, *zip(*cases, strict=True)))


def measure(m: int, threads: int, side: int, family: str) -> Cell:
    """Solve one matrix in this process: once for the peak memory, then for the time."""
    import masksolve as ms
    from benchmarks.families import random_matrix
    from benchmarks.memory import peak_beyond_result

    n = m // 2
    for each in ("gaussian", "int8-valued"):  # compiles, or loads from the disk, what ties need too
        ms.solve_matrix(random_matrix(each, 4 * m), n, m, threads=threads)
    matrix = random_matrix(family, side - side % m)
    peak = peak_beyond_result(lambda: ms.solve_matrix(matrix, n, m, threads=threads))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        ms.solve_matrix(matrix, n, m, threads=threads)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    return Cell(f"{n}:{m}", m, threads, len(matrix), seconds, seconds / matrix.size * 1e9, peak)


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, for people."""
    from benchmarks.report import significant

    columns = ["pattern", "threads", "matrix", "ms", "ns/weight", "peak memory beyond matrix and mask, MiB"]
    rows = [
        [
            cell.pattern,
            str(cell.threads),
            f"{cell.side}×{cell.side}",
            significant(cell.seconds * 1e3),
            significant(cell.nanoseconds_per_weight),
            "n/a" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**20:.1f}",
        ]
        for cell in cells
    ]
    return columns, rows


def summary(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return a row for each pattern: milliseconds by size on one thread; at the end more threads, and memory."""
    from benchmarks.report import significant

    patterns = list(dict.fromkeys(cell.pattern for cell in cells))
    most_threads = max(cell.threads for cell in cells)
    rows = []
    for pattern in patterns:
        one = [cell for cell in cells if cell.pattern == pattern and cell.threads == 1]
        most = [cell for cell in cells if cell.pattern == pattern and cell.threads == most_threads][-1]
        peaks = [cell.peak_bytes for cell in cells if cell.pattern == pattern]
        peak = "n/a" if None in peaks else f"{max(filter(None, peaks), default=0) / 2**20:.1f}"
        times = [significant(cell.seconds * 1e3) for cell in one]
        rows.append([pattern, *times, significant(most.seconds * 1e3), f"{one[-1].nanoseconds_per_weight:.2f}", peak])
    sides = [f"{side}²" for side in dict.fromkeys(_side_of(cell) for cell in cells)]
    largest = sides[-1]
    columns = ["pattern", *sides, f"{largest}, {most_threads} threads", f"{largest}, ns/weight", "peak MiB"]
    return columns, rows


def _side_of(cell: Cell) -> int:
    """Return the size before it was cut to a multiple of M."""
    return next(side for side in _SIDES if side >= cell.side)


def _draw(cells: Sequence[Cell], path: Path) -> list[Path]:
    """Draw three panels: time against the matrix, cost of a weight against M, and memory against the matrix."""
    try:
        from benchmarks.figures import BLACK, BLUE, FONT, GREEN, GREY, VERMILION, label_powers, plt
    except ImportError as error:
        print(f"no figure: {error}")
        return []
    plt.rcParams["font.size"] = 1.4 * FONT
    figure, (time, cost, memory) = plt.subplots(1, 3, figsize=(26, 10), layout="constrained")
    shown = {4: GREY, 8: BLUE, 16: GREEN, 32: VERMILION, 64: BLACK}
    look = {"marker": "o", "linewidth": 3, "markersize": 9}
    lines = dict(zip(sorted({cell.threads for cell in cells}), ("-", "--"), strict=False))
    largest = max(cell.side for cell in cells)
    for threads, line in lines.items():
        for m, colour in shown.items():
            some = [cell for cell in cells if (cell.m, cell.threads) == (m, threads)]
            sides = [cell.side for cell in some]
            time.plot(sides, [cell.seconds * 1e3 for cell in some], color=colour, linestyle=line, **look)
            if all(cell.peak_bytes is not None for cell in some):
                memory.plot(sides, [cell.peak_bytes / 2**20 for cell in some], color=colour, linestyle=line, **look)
        some = [cell for cell in cells if cell.threads == threads and cell.side > 0.9 * largest]
        values = [cell.nanoseconds_per_weight for cell in some]
        cost.plot([cell.m for cell in some], values, color=BLACK, linestyle=line, **look)

    time.set(yscale="log", ylabel="ms", title="Time from matrix to mask")
    memory.set(ylabel="MiB", title="Peak memory beyond both", ylim=(0, max(1, memory.get_ylim()[1])))
    sides = sorted({cell.side for cell in cells if cell.m == 4})
    for axes in (time, memory):
        label_powers(axes.xaxis, sides[:: 2 if len(sides) > 5 else 1])
        axes.set_xlabel("rows and columns")
    cost.set(yscale="log", xlabel="M (N = M/2)", ylabel="ns", title=f"Time per weight at {largest}²")
    label_powers(cost.xaxis, sorted({cell.m for cell in cells}))
    label_powers(cost.yaxis, [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if _within(tick, cost.get_ylim())])
    for axes in (time, cost, memory):
        axes.minorticks_off()
        axes.grid(visible=True, color="#dddddd")

    dashes = [
        plt.Line2D([], [], color=BLACK, linestyle=line, linewidth=3, label=f"{threads} thread{'s' * (threads > 1)}")
        for threads, line in lines.items()
    ]
    patterns = [plt.Line2D([], [], color=colour, label=f"{m // 2}:{m}", **look) for m, colour in shown.items()]
    time.legend(handles=patterns)
    cost.legend(handles=dashes)
    figure.savefig(path, dpi=75)
    plt.close(figure)
    return [path]


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


if __name__ == "__main__":
    main()
