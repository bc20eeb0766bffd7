"""Seconds per tile of every solver, on one thread: the paper's three, their relatives, and the exact one."""

import os

# Read when NumPy loads: matrix products and solvers get one thread each.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

import masksolve as ms

# Long enough that the clock and a first call do not show.
SECONDS = 2.0

Blocks = NDArray[np.float32]


def integer_program(blocks: Blocks, n: int, m: int) -> None:
    """Solve the paper's integer program as its code states it: PuLP and CBC, binary variables, one program per tile."""
    lines = range(m)
    for block in np.abs(blocks).astype(np.float64):
        program = pulp.LpProblem("tile", pulp.LpMaximize)
        x = pulp.LpVariable.dicts("x", (lines, lines), cat="Binary")
        program += pulp.lpSum(block[i, j] * x[i][j] for i in lines for j in lines)
        for i in lines:
            program += pulp.lpSum(x[i][j] for j in lines) == n
            program += pulp.lpSum(x[j][i] for j in lines) == n
        if program.solve(pulp.PULP_CBC_CMD(msg=False)) != pulp.LpStatusOptimal:
            raise RuntimeError(f"CBC did not solve a {n}:{m} tile")


def _method(name: str) -> Callable[[Blocks, int, int], Any]:
    return lambda blocks, n, m: ms.solve_blocks(blocks, n, m, method=name, threads=1)


SOLVERS: dict[str, Callable[[Blocks, int, int], Any]] = {
    "integer program (CBC)": integer_program,
    "LP relaxation (HiGHS)": _method("lp"),
    "min-cost flow (OR-tools)": _method("flow"),
    "greedy": _method("greedy"),
    "2-approximation": _method("two-approx"),
    "exact (masksolve)": _method("exact"),
}


def seconds_per_tile(solver: str, n: int, m: int) -> float:
    """Time over number of Gaussian tiles, as many as take two seconds or more."""
    solve = SOLVERS[solver]
    rng = np.random.default_rng(0)
    tiles = 1
    solve(rng.standard_normal((tiles, m, m), np.float32), n, m)
    while True:
        blocks = rng.standard_normal((tiles, m, m), np.float32)
        start = time.perf_counter()
        solve(blocks, n, m)
        seconds = time.perf_counter() - start
        if seconds >= SECONDS or tiles * m * m >= 1 << 24:
            return seconds / tiles
        tiles = min(max(2 * tiles, round(1.2 * tiles * SECONDS / seconds)), 32 * tiles)
