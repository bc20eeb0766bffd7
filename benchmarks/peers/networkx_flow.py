"""networkx's network simplex on integer costs, one tile at a time.

Hubara et al. 2021 run networkx on the float weights, for which it is not guaranteed to end (and does hang); here the
weights become integers first, 2**40 for the largest of a tile.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
from numpy.typing import NDArray

_LARGEST = 2.0**40


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """Masks with exactly n ones in every line."""
    return np.array([_solve_tile(tile, n) for tile in np.abs(tiles).astype(np.float64)])


def _solve_tile(weights: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    m = len(weights)
    costs = -np.rint(weights / (weights.max() or 1.0) * _LARGEST).astype(np.int64)
    graph = nx.DiGraph()
    graph.add_nodes_from((("row", i) for i in range(m)), demand=-n)
    graph.add_nodes_from((("column", j) for j in range(m)), demand=n)
    for i, line in enumerate(costs.tolist()):
        graph.add_edges_from(
            (("row", i), ("column", j), {"capacity": 1, "weight": cost}) for j, cost in enumerate(line)
        )
    flow = nx.min_cost_flow(graph)
    return np.array([[flow["row", i]["column", j] for j in range(m)] for i in range(m)], np.bool_)
