"""Method "flow": the paper's min-cost flow, through OR-tools' SimpleMinCostFlow, one network per tile.

Source: Hubara et al. 2021 (arXiv 2102.08124). Rows supply N units, columns demand N, arc (i, j) has capacity 1 and
cost -|w_ij|. Where a line holds *at most* N, a node "unused capacity" takes the row's rest, or fills the column's,
at no cost.

OR-tools wants integer costs. Each tile is scaled by a power of two so that its largest weight lies just below
2**(59 - log2 M), 2**56 for M = 8 (OR-tools refuses costs from about four times that: BAD_COST_RANGE). Nothing
overflows at any magnitude. The mask is optimal for the weights as given where they are all multiples of that unit:
integers up to 2**53 for M <= 32, float16, and bfloat16 and float32 tiles whose weights, but for zeros, span less
than a factor of about 2**48 / M and 2**32 / M. Beyond that a weight is rounded to the nearest unit, so that the
mask falls short by at most M * N units, 1e-13 of the tile's largest weight for M = 8.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

from masksolve._threads import Piece, for_each_chunk, importance_of
from masksolve._tiles import Margins


def solve(tiles: NDArray[Any], masks: NDArray[np.bool_], margins: Margins, *, threads: int | None) -> None:
    """Fill masks (P, Q, r, c) with optimal masks of tiles (P, Q, r, c)."""

    def work(piece: Piece) -> None:
        importance = importance_of(tiles[piece])
        chunk = np.empty(importance.shape, np.bool_)
        for index in np.ndindex(importance.shape[:2]):
            chunk[index] = _solve_tile(importance[index], margins)
        masks[piece] = chunk

    for_each_chunk(work, tiles.shape, threads)


def _solve_tile(importance: NDArray[np.float64], margins: Margins) -> NDArray[np.bool_]:
    rows, cols = importance.shape
    network = SimpleMinCostFlow()
    tails, heads, capacities, supplies = _network(rows, cols, margins)
    costs = np.zeros(len(tails), np.int64)
    costs[: rows * cols] = -_integer_costs(importance).ravel()
    arcs = network.add_arcs_with_capacity_and_unit_cost(tails, heads, capacities, costs)
    network.set_nodes_supplies(np.arange(len(supplies), dtype=np.int32), supplies)
    status = network.solve()
    if status != network.OPTIMAL:
        raise RuntimeError(f"OR-tools did not solve a {rows}x{cols} tile: {status}; please report this tile")
    flow: NDArray[Any] = network.flows(arcs[: rows * cols])
    return flow.reshape(rows, cols) > 0


@functools.lru_cache(maxsize=64)
def _network(rows: int, cols: int, margins: Margins) -> tuple[NDArray[Any], ...]:
    """Return tails, heads and capacities of all arcs, the tile's entries first, and the supply of every node."""
    kept = margins.kept
    row_nodes = np.arange(rows)
    column_nodes = rows + np.arange(cols)
    unused = rows + cols
    tails = [np.repeat(row_nodes, cols)]
    heads = [np.tile(column_nodes, rows)]
    if not margins.exact_rows:
        tails.append(row_nodes)
        heads.append(np.full(rows, unused))
    if not margins.exact_columns:
        tails.append(np.full(cols, unused))
        heads.append(column_nodes)
    all_tails = np.concatenate(tails).astype(np.int32)
    capacities = np.ones(len(all_tails), np.int64)
    capacities[rows * cols :] = kept
    supplies = np.concatenate([np.full(rows, kept), np.full(cols, -kept), [kept * (cols - rows)]]).astype(np.int64)
    return all_tails, np.concatenate(heads).astype(np.int32), capacities, supplies


def _integer_costs(importance: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return importance times a power of two, as integers that OR-tools accepts."""
    bits = 59 - int(np.ceil(np.log2(max(importance.shape))))
    exponent = bits - int(np.frexp(importance.max())[1])
    # In two steps, since 2**exponent itself can be out of range.
    half = exponent // 2
    scaled = np.ldexp(np.ldexp(importance, half), exponent - half)
    return np.rint(scaled).astype(np.int64)
