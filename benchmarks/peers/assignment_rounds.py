"""n rounds of SciPy's linear_sum_assignment, each without the entries that earlier rounds took: an approximation.

Every round adds one entry to each row and column. What is left after k rounds is a regular bipartite graph, which has a
perfect matching, so that n rounds always fill every line. Each round is optimal for itself, their union need not be.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """Masks with exactly n ones in every line."""
    return np.array([_solve_tile(tile, n) for tile in np.abs(tiles).astype(np.float64)])


def _solve_tile(weights: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    mask = np.zeros(weights.shape, np.bool_)
    for _ in range(n):
        mask[linear_sum_assignment(weights, maximize=True)] = True
        weights[mask] = -np.inf
    return mask
