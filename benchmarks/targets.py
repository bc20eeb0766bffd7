"""Every figure that the design promises beside the figure measured: `python -m benchmarks.targets`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import OUTPUT, ROOT, describe, header, pin_threads
from benchmarks.marks import write_between_marks
from masksolve._cores import usable_cores

_HALVES = ((2, 4), (4, 8), (8, 16), (16, 32))
_REPEATS = 5


@dataclass(frozen=True)
class Line:
    """One promise: `measured` must be at least (or at most) `target`; without a target it is only shown."""

    what: str
    case: str
    relation: str
    target: float | None
    measured: float | None
    unit: str

    @property
    def verdict(self) -> str:
        """met, MISSED, shown or not measured."""
        if self.measured is None:
            return "not measured here"
        if self.target is None:
            return "shown"
        met = self.measured >= self.target if self.relation == "≥" else self.measured <= self.target
        return "met" if met else "MISSED"


def main() -> None:
    """Measure everything, print markdown, save markdown and JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrices (4096)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the markdown and JSON files")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="also put the table between the marks 'speed' of FILE"
    )
    parser.add_argument(
        "--earlier", type=Path, metavar="FOLDER", help="also measure the checkout of an earlier commit, in turn"
    )
    arguments = parser.parse_args()
    pin_threads(1)

    lines: list[Line] = []
    parts: tuple[Callable[[int], list[Line]], ...] = (
        speed,
        threads,
        ties,
        at_most,
        one_sided,
        layouts,
        ragged,
        large_tiles,
        certificates,
        warm_start,
        small_calls,
    )
    if arguments.earlier:
        parts = partial(earlier, arguments.earlier), *parts
    for part in (*parts, memory, processors, first_call, import_time):
        print(
            f"measuring: {getattr(part, '__name__', 'the earlier commit').replace('_', ' ')}",
            file=sys.stderr,
            flush=True,
        )
        lines += part(arguments.size)
    text = f"{markdown(lines)}\n\n{_settings(arguments.size)}\n\n{header(1)}\n"
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "targets.md").write_text(text, encoding="utf-8")
    if arguments.write:
        write_between_marks(arguments.write, "speed", text.strip())
    document = {**describe(1), "lines": [{**asdict(line), "verdict": line.verdict} for line in lines]}
    (arguments.output / "targets.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def markdown(lines: list[Line]) -> str:
    """Return the table."""
    from benchmarks.report import markdown, significant

    rows = [
        [
            line.what,
            line.case,
            "-" if line.target is None else f"{line.relation} {line.target:g}{line.unit}",
            "-" if line.measured is None else f"{significant(line.measured)}{line.unit}",
            line.verdict,
        ]
        for line in lines
    ]
    return markdown(("what", "case", "target", "measured", ""), rows)


def speed(size: int) -> list[Line]:
    """`exact` against the other solvers and the memory floor, Gaussian weights, one thread; its masks certified."""
    from benchmarks.families import random_matrix
    from benchmarks.measure import Effort, judge, measure
    from benchmarks.solvers import every_solver

    least = {
        "flow": (1500, 800, 400, 200),
        "LEMON network simplex": (90, 100, 95, 70),
        "90-mask product": (5,),
        "TSENOR": (200, 200, 200, 200),
        "greedy": (1, 1, 1, 1),
    }
    most = (1.4, 1.8, 2.4, 3.7)
    effort = Effort(0.5, _REPEATS, 1 << 15)
    wanted = [solver for solver in every_solver(1)[0] if solver.name in (*least, "exact", "numpy.abs")]
    matrix = random_matrix("gaussian", size)
    lines = []
    for index, (n, m) in enumerate(_HALVES):
        runs = {run.solver.name: run for run in measure(wanted, matrix, n, m, effort, 1)}
        exact = runs["exact"].per_tile()
        lines.append(Line("`exact`, time per tile", f"{n}:{m}", "", None, exact * 1e6, " µs"))
        for name, targets in least.items():
            if index < len(targets):
                ratio = runs[name].per_tile() / exact if name in runs else None
                lines.append(Line(f"times faster than {name}", f"{n}:{m}", "≥", targets[index], ratio, "×"))
        floor = exact / runs["numpy.abs"].per_tile()
        lines.append(Line("time over `numpy.abs`", f"{n}:{m}, 1 thread", "≤", most[index], floor, "×"))
        row = judge(runs["exact"], n, m, "gaussian", effort)
        proven = float(row.certified == "yes")
        lines.append(Line("certified optimal", f"{n}:{m}, {row.certified_tiles} tiles", "≥", 1, proven, ""))
    return sorted(lines, key=lambda line: line.what)


def threads(size: int) -> list[Line]:
    """Two threads against one, and against the memory floor with two threads."""
    import masksolve as ms
    from benchmarks.families import random_matrix
    from benchmarks.solvers import memory_floor
    from benchmarks.tiling import Sample

    if usable_cores() < 2:
        return [Line("two threads against one", "one usable core", "≥", 1.8, None, "×")]
    matrix = random_matrix("gaussian", size)
    floor = memory_floor()
    lines = []
    for n, m in _HALVES:
        taken = in_turn(
            {
                "one": lambda n=n, m=m: ms.solve_matrix(matrix, n, m, threads=1),
                "two": lambda n=n, m=m: ms.solve_matrix(matrix, n, m, threads=2),
                "floor": lambda n=n, m=m: floor.run(Sample(matrix, matrix), n, m, 2),
                "floor of one": lambda n=n, m=m: floor.run(Sample(matrix, matrix), n, m, 1),
            }
        )
        lines.append(Line("two threads against one", f"{n}:{m}", "≥", 1.8, taken["one"] / taken["two"], "×"))
        gain = taken["floor of one"] / taken["floor"]
        lines.append(Line("`numpy.abs`, two threads against one", f"beside {n}:{m}", "", None, gain, "×"))
        over = taken["two"] / taken["floor"]
        lines.append(Line("time over `numpy.abs`", f"{n}:{m}, 2 threads each", "", None, over, "×"))
    return sorted(lines, key=lambda line: line.what)


def ties(size: int) -> list[Line]:
    """Weights that tie against Gaussian ones."""
    import masksolve as ms
    from benchmarks.families import MORE_TIES, random_matrix

    matrices = {name: random_matrix(name, size) for name in ("gaussian", "int8-valued", "half-zero", *MORE_TIES)}
    lines = []
    for n, m in _HALVES:
        calls = {
            name: lambda matrix=matrix, n=n, m=m: ms.solve_matrix(matrix, n, m, threads=1)
            for name, matrix in matrices.items()
        }
        taken = in_turn(calls)
        gaussian = taken.pop("gaussian")
        lines += [
            Line(f"{name} against Gaussian", f"{n}:{m}", "≤", 1.7, seconds / gaussian, "×")
            for name, seconds in taken.items()
        ]
    return sorted(lines, key=lambda line: line.what)


def at_most(size: int) -> list[Line]:
    """At most n in a line against exactly n."""
    import masksolve as ms
    from benchmarks.families import random_matrix

    matrix = random_matrix("gaussian", size)
    lines = []
    for n, m in _HALVES:
        exactly, most = in_turn(
            {
                saturated: lambda n=n, m=m, saturated=saturated: ms.solve_matrix(
                    matrix, n, m, saturated=saturated, threads=1
                )
                for saturated in (True, False)
            }
        ).values()
        lines.append(Line("`saturated=False` against `True`", f"{n}:{m}", "≤", 1.2, most / exactly, "×"))
    return lines


def one_sided(size: int) -> list[Line]:
    """Solve along rows, and along columns, against transposable masks."""
    import masksolve as ms
    from benchmarks.families import random_matrix

    matrix = random_matrix("gaussian", size)
    lines = []
    for n, m in _HALVES:
        calls = {
            direction: partial(ms.solve_matrix, matrix, n, m, direction=direction, threads=1)
            for direction in ("both", "rows", "columns")
        }
        taken = in_turn(calls)
        lines += [
            Line("one-sided against transposable", f"{n}:{m}, {name}", "≤", 0.5, taken[name] / taken["both"], "×")
            for name in ("rows", "columns")
        ]
    return lines


def layouts(size: int) -> list[Line]:
    """Weights in Fortran order, and in 16 bits, against the same values in C order and float32."""
    import ml_dtypes
    import numpy as np

    import masksolve as ms
    from benchmarks.families import random_matrix

    matrix = random_matrix("gaussian", size)
    pairs: dict[str, tuple[Any, Any]] = {"Fortran order against C order": (np.asfortranarray(matrix), matrix)}
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        halves = matrix.astype(dtype)
        pairs[f"{dtype.name} against the same values in float32"] = halves, halves.astype(np.float32)
    lines = []
    for what, pair in pairs.items():
        for n, m in _HALVES:
            calls = {k: partial(ms.solve_matrix, weights, n, m, threads=1) for k, weights in enumerate(pair)}
            taken = in_turn(calls)
            lines.append(Line(what, f"{n}:{m}", "≤", 1.3, taken[0] / taken[1], "×"))
    return lines


_SOLVE = """
import sys, time
import masksolve as ms
from benchmarks.families import random_matrix
n, m, size = map(int, sys.argv[1:])
matrix = random_matrix("gaussian", size)
taken = []
for _ in range(6):
    start = time.perf_counter()
    ms.solve_matrix(matrix, n, m, threads=1)
    taken.append(time.perf_counter() - start)
print(min(taken[1:]))
"""


def processors(size: int) -> list[Line]:
    """Machine code for lesser processors against that for the next better one, on this one."""
    if platform.machine() != "x86_64":
        return []
    kinds = {"SSE2": ("x86-64", ""), "AVX2": ("haswell", ""), "AVX-512": ("skylake-avx512", "")}
    if "avx512f" not in describe(1)["machine"]:
        del kinds["AVX-512"]
    lines = []
    for n, m in _HALVES:
        environments = {
            kind: {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features} for kind, (name, features) in kinds.items()
        }
        taken = _in_turn_apart(environments, n, m, size)
        lines += [
            Line(
                f"{less} against {more}", f"{n}:{m}", "≤", 2 if less == "SSE2" else 1.3, taken[less] / taken[more], "×"
            )
            for less, more in itertools.pairwise(kinds)
        ]
    return sorted(lines, key=lambda line: line.what)


def earlier(folder: Path, size: int) -> list[Line]:
    """Measure an earlier commit against this one."""
    lines = []
    for (n, m), target in zip(_HALVES, (2, 1.5, 1.7, 1.7), strict=True):
        taken = _in_turn_apart({"earlier": {}, "now": {}}, n, m, size, folders={"earlier": folder})
        ratio = taken["earlier"] / taken["now"]
        lines.append(Line("times faster than the earlier commit", f"{n}:{m}", "≥", target, ratio, "×"))
    return lines


def _in_turn_apart(
    environments: Mapping[str, Mapping[str, str]], n: int, m: int, size: int, folders: Mapping[str, Path] | None = None
) -> dict[str, float]:
    """Least seconds of a solve in each environment, in processes of their own, all of them in turn.

    `folders` are those of the checkouts that take the place of this one.
    """
    taken: dict[str, list[float]] = {name: [] for name in environments}
    for _ in range(3):
        for name, environment in environments.items():
            folder = (folders or {}).get(name, ROOT)
            taken[name] += _python(_SOLVE, str(n), str(m), str(size), environment=environment, folder=folder)
    return {name: min(seconds) for name, seconds in taken.items()}


def certificates(size: int) -> list[Line]:
    """`certify` against the solve, on as many threads: optimal masks, and others."""
    import masksolve as ms
    from benchmarks.families import random_matrix

    lines = []
    for family, reading, saturated, direction in (
        ("gaussian", "exactly n", True, "both"),
        ("gaussian", "at most n", False, "both"),
        ("int8-valued", "exactly n", True, "both"),
        ("gaussian", "rows", True, "rows"),
        ("gaussian", "columns", True, "columns"),
    ):
        matrix, options = random_matrix(family, size), {"saturated": saturated, "direction": direction}
        for n, m in _HALVES:
            best = ms.solve_matrix(matrix, n, m, **options)
            # Transposable masks are not the best one-sided ones.
            other = ms.solve_matrix(matrix, n, m, method="greedy" if direction == "both" else "exact")
            taken = in_turn(
                {
                    "solve": partial(ms.solve_matrix, matrix, n, m, **options),
                    "best": partial(ms.certify, matrix, best, n, m, **options),
                    "other": partial(ms.certify, matrix, other, n, m, **options),
                }
            )
            case = f"{n}:{m}, {family}, {reading}"
            of_best, of_other = taken["best"] / taken["solve"], taken["other"] / taken["solve"]
            lines += [
                Line("`certify` of an optimal mask against the solve", case, "≤", 3, of_best, "×"),
                Line("`certify` of another mask against the solve", case, "≤", 8, of_other, "×"),
            ]
    return sorted(lines, key=lambda line: line.what)


def ragged(size: int) -> list[Line]:
    """Solve a matrix that lacks a row and a column, against one of whole tiles."""
    import masksolve as ms
    from benchmarks.families import random_matrix

    lines = []
    for family in ("gaussian", "int8-valued", "half-zero"):
        whole = random_matrix(family, size)
        edged = whole[:-1, :-1].copy()
        for n, m in _HALVES:
            taken = in_turn(
                {
                    "whole": lambda n=n, m=m, whole=whole: ms.solve_matrix(whole, n, m, threads=1),
                    "edged": lambda n=n, m=m, edged=edged: ms.solve_matrix(edged, n, m, threads=1),
                }
            )
            ratio = taken["edged"] / taken["whole"]
            lines.append(Line(f"{size - 1}² against {size}²", f"{n}:{m}, {family}", "≤", 1.3, ratio, "×"))
    return lines


def large_tiles(size: int) -> list[Line]:
    """Tiles of more than 64x64 against those of 64x64, per weight."""
    import masksolve as ms
    from benchmarks.families import random_matrix

    lines = []
    for family in ("gaussian", "int8-valued", "half-zero"):
        matrix = random_matrix(family, size // 2)
        taken = in_turn(
            {
                m: lambda m=m, matrix=matrix: ms.solve_matrix(
                    matrix[: -(len(matrix) % m) or None], m // 2, m, threads=1
                )
                for m in (64, 66, 128)
            }
        )
        for m in (66, 128):
            target = 4 if family == "gaussian" else None
            ratio = taken[m] / taken[64]
            lines.append(Line("m > 64 against m = 64, per weight", f"{m // 2}:{m}, {family}", "≤", target, ratio, "×"))
    return lines


def warm_start(size: int) -> list[Line]:
    """From the last solve's potentials against from none, after the weights moved by 0.1 % of their spread."""
    import numpy as np

    import masksolve as ms
    from benchmarks.families import SEED, random_matrix

    before = random_matrix("gaussian", size)
    step = np.random.default_rng(SEED + 1).standard_normal(before.shape, dtype=np.float32)
    after = before + np.float32(1e-3) * step
    lines = []
    for n, m in _HALVES:
        _, potentials = ms.solve_matrix(before, n, m, threads=1, return_potentials=True)
        taken = in_turn(
            {
                "cold": lambda n=n, m=m: ms.solve_matrix(after, n, m, threads=1),
                "warm": lambda n=n, m=m, p=potentials: ms.solve_matrix(after, n, m, threads=1, potentials=p),
            }
        )
        gain = taken["cold"] / taken["warm"]
        least = 1.6 if m > 8 else 1
        lines.append(Line("gain of a warm start", f"{n}:{m}, after a small step", "≥", least, gain, "×"))
    return lines


def small_calls(size: int) -> list[Line]:
    """Measure what one small call costs beyond the solve, as the bulk does it."""
    import masksolve as ms
    from benchmarks.families import random_matrix

    matrix = random_matrix("gaussian", size)
    lines = []
    for n, m in ((2, 4), (4, 8)):
        bulk = in_turn({"bulk": lambda n=n, m=m: ms.solve_matrix(matrix, n, m, threads=1)})["bulk"]
        per_tile = bulk / (size // m) ** 2
        block, small = matrix[:m, :m].copy(), matrix[:64, :64].copy()
        for what, call, tiles, target in (
            (f"`solve_block`, {m}x{m}", lambda n=n, m=m, block=block: ms.solve_block(block, n, m), 1, 10),
            ("`solve_matrix`, 64x64", lambda n=n, m=m, small=small: ms.solve_matrix(small, n, m), (64 // m) ** 2, 12),
        ):
            beyond = per_call(call) - tiles * per_tile
            lines.append(Line(f"overhead of {what}", f"{n}:{m}", "≤", target, beyond * 1e6, " µs"))
    return lines


def memory(size: int) -> list[Line]:
    """Peak memory beyond the matrix and its mask, each case in a process of its own."""
    from benchmarks.growth import measure_apart

    counts = [count for count in (1, 2) if count <= usable_cores()]
    families = ("gaussian", "int8-valued")
    cases = [(m, count, size, family) for m in (4, 32) for count in counts for family in families]
    lines = []
    for (_, count, _, family), cell in zip(cases, measure_apart(cases), strict=True):
        peak = None if cell.peak_bytes is None else cell.peak_bytes / 2**20
        case = f"{cell.pattern}, {family}, {count} thread{'s' if count > 1 else ''}"
        lines.append(Line("peak memory beyond input and output", case, "≤", 8 + count, peak, " MiB"))
    return lines


_FIRST_CALL = """
import sys, time
import numpy as np
from benchmarks.families import random_matrix
family, n, m = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
# With partial tiles at the edges.
matrix = random_matrix(family, 255)
start = time.perf_counter()
import masksolve as ms
ms.solve_matrix(matrix, n, m, threads=1)
print(time.perf_counter() - start)
"""


def first_call(size: int) -> list[Line]:
    """Time the first call of a pattern in a process, with nothing compiled before, and again from the disk cache."""
    lines = []
    for family in ("gaussian", "int8-valued"):
        for n, m in _HALVES:
            with tempfile.TemporaryDirectory() as folder:
                environment = {"NUMBA_CACHE_DIR": folder}
                empty, cached = (_python(_FIRST_CALL, family, str(n), str(m), environment=environment)[0] for _ in "12")
            case = f"{n}:{m}, {family}"
            lines += [
                Line("first call, compiling", case, "≤", 3, empty, " s"),
                Line("first call, from the disk cache", case, "≤", 0.25, cached, " s"),
            ]
    return sorted(lines, key=lambda line: line.what)


_IMPORT = """
import time
import numpy
start = time.perf_counter()
from masksolve import *
print(time.perf_counter() - start)
"""


def import_time(size: int) -> list[Line]:
    """`import masksolve`, with every public name, in a process that has imported NumPy."""
    milliseconds = statistics.median(_python(_IMPORT)[0] for _ in range(7)) * 1e3
    return [Line("`import masksolve` beyond `import numpy`", "", "≤", 30, milliseconds, " ms")]


def in_turn(calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    """Median seconds of each call, all of them in turn; each is called once before."""
    taken: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(_REPEATS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def per_call(call: Callable[[], object]) -> float:
    """Median seconds of a short call, made a thousand times in each of several runs."""
    call()
    return statistics.median(timeit.repeat(call, number=1000, repeat=_REPEATS)) / 1000


def _python(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, folder: Path = ROOT
) -> list[float]:
    """Return the numbers that a program prints in a new process, which imports what lies in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()]


def _settings(size: int) -> str:
    return (
        f"Gaussian float32 weights, {size}×{size}, one thread, medians of {_REPEATS} in turn, unless the case says "
        "otherwise; slower solvers on fewer tiles. The first call imports masksolve, in a process that has NumPy, and "
        "solves partial tiles too; of int8-valued weights, with what ties need."
    )


if __name__ == "__main__":
    main()
