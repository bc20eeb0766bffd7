"""The paper's integer program through PuLP and CBC, one tile at a time: a re-implementation from its description.

Hubara et al. 2021 (arXiv 2102.08124): a 0/1 integer variable for each entry, n ones in every row and column. The
weights go in as they are, as in the paper's code; PuLP hands every tile to CBC in a file and a process of its own.
"""

from __future__ import annotations

import numpy as np
import pulp
from numpy.typing import NDArray


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """Masks with exactly n ones in every line."""
    return np.array([_solve_tile(tile, n) for tile in np.abs(tiles).astype(np.float64)])


def _solve_tile(weights: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    m = len(weights)
    program = pulp.LpProblem("tile", pulp.LpMaximize)
    x = [[pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary) for j in range(m)] for i in range(m)]
    program += pulp.lpSum(float(weights[i, j]) * x[i][j] for i in range(m) for j in range(m))
    for line in (*x, *zip(*x, strict=True)):
        program += pulp.lpSum(line) == n
    if program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1)) != pulp.LpStatusOptimal:
        raise RuntimeError(f"CBC did not solve a {m}x{m} tile: {pulp.LpStatus[program.status]}")
    return np.array([[variable.value() > 0.5 for variable in line] for line in x])
