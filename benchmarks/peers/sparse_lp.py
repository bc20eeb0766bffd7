"""Many tiles as one sparse linear program: the relaxation of the paper's integer program, block after block.

The constraints of a tile are totally unimodular, and so are those of many tiles together, so that a simplex solver
(HiGHS, through `scipy.optimize.linprog`) returns masks. Chunks of tiles: the time grows faster than the program.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

_CHUNK_VARIABLES = 1 << 12
# Tolerances are absolute: the largest weight becomes this, and masks are told apart by 1e-10 of it or less.
_LARGEST = 2.0**20
_TOLERANCES = {"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10}


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """Masks with exactly n ones in every line."""
    at_once = max(1, _CHUNK_VARIABLES // tiles[0].size)
    return np.concatenate([_solve_chunk(tiles[i : i + at_once], n) for i in range(0, len(tiles), at_once)])


def _solve_chunk(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    weights = np.abs(tiles).astype(np.float64)
    weights *= _LARGEST / (weights.max() or 1.0)
    lines = _lines(len(tiles), tiles.shape[1])
    result = linprog(
        -weights.ravel(),
        A_eq=lines,
        b_eq=np.full(lines.shape[0], n),
        bounds=(0, 1),
        method="highs-ds",
        options=_TOLERANCES,
    )
    if result.status != 0:
        raise RuntimeError(f"HiGHS did not solve {len(tiles)} tiles: {result.message}")
    masks: NDArray[np.bool_] = result.x.reshape(tiles.shape) > 0.5
    return masks


def _lines(count: int, m: int) -> csr_array:
    """One row for each row and each column of each tile, with ones at its entries."""
    entry = np.arange(count * m * m)
    tile, row, column = entry // (m * m), entry // m % m, entry % m
    lines = np.concatenate([2 * m * tile + row, 2 * m * tile + m + column])
    return csr_array((np.ones(len(lines)), (lines, np.tile(entry, 2))), shape=(2 * m * count, len(entry)))
