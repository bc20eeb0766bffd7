"""Slow, obvious oracles. They share no code with the package, and compute with unbounded integers only.

A tile has at most n ones in every row and column: exactly n in rows where `exact_rows`, in columns where
`exact_columns`.
"""

import functools
import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = tuple[tuple[int, ...], ...]


def kept(weights: NDArray[Any], mask: NDArray[Any]) -> Fraction:
    """The importance that a mask keeps, exactly."""
    return sum((Fraction(float(w)) for w in abs(weights.astype(np.float64))[mask.astype(bool)]), Fraction(0))


def integers(weights: NDArray[Any]) -> list[list[int]]:
    """abs(weights), all times the same power of two, which makes them integers."""
    ratios = [[abs(float(w)).as_integer_ratio() for w in row] for row in weights]
    unit = max(denominator for row in ratios for _, denominator in row)
    return [[numerator * (unit // denominator) for numerator, denominator in row] for row in ratios]


@functools.cache
def all_masks(rows: int, columns: int, n: int, exact_rows: bool = True, exact_columns: bool = True) -> list[Mask]:
    """Every valid mask of a small tile."""

    def fits(total: int, exact: bool) -> bool:
        return total == n if exact else total <= n

    lines = [line for line in itertools.product((0, 1), repeat=columns) if fits(sum(line), exact_rows)]
    masks = itertools.product(lines, repeat=rows)
    return [mask for mask in masks if all(fits(sum(column), exact_columns) for column in zip(*mask, strict=True))]


def best_by_enumeration(weights: NDArray[Any], n: int, exact_rows: bool = True, exact_columns: bool = True) -> Fraction:
    """The most importance that any valid mask of a small tile keeps."""
    masks = all_masks(*weights.shape, n, exact_rows, exact_columns)
    c = [w for row in integers(weights) for w in row]
    best = max(masks, key=lambda mask: sum(itertools.compress(c, itertools.chain(*mask))))
    return kept(weights, np.array(best))


def is_valid_tile(mask: NDArray[Any], n: int, exact_rows: bool = True, exact_columns: bool = True) -> bool:
    rows, columns = mask.sum(axis=1), mask.sum(axis=0)
    full = (not exact_rows or (rows == n).all()) and (not exact_columns or (columns == n).all())
    return bool(full and (rows <= n).all() and (columns <= n).all())


def is_optimal_tile(
    weights: NDArray[Any], mask: NDArray[Any], n: int, exact_rows: bool = True, exact_columns: bool = True
) -> bool:
    """Whether the mask is valid and no exchange gains: the residual graph has no negative cycle (Bellman-Ford).

    A unit of flow enters a row, crosses to a column where the mask is one, and leaves. One more node stands for the
    world outside, with which lines that need not hold exactly n exchange units at no cost.
    """
    if not is_valid_tile(mask, n, exact_rows, exact_columns):
        return False
    rows, columns = weights.shape
    c = integers(weights)
    outside = rows + columns
    arcs: list[tuple[int, int, int]] = []
    for i, j in np.ndindex(rows, columns):
        arcs.append((rows + j, i, c[i][j]) if mask[i, j] else (i, rows + j, -c[i][j]))
    if not exact_rows:
        arcs += [(outside, i, 0) for i, ones in enumerate(mask.sum(axis=1)) if ones < n]
        arcs += [(i, outside, 0) for i, ones in enumerate(mask.sum(axis=1)) if ones > 0]
    if not exact_columns:
        arcs += [(rows + j, outside, 0) for j, ones in enumerate(mask.sum(axis=0)) if ones < n]
        arcs += [(outside, rows + j, 0) for j, ones in enumerate(mask.sum(axis=0)) if ones > 0]

    distance = [0] * (outside + 1)
    for _ in range(outside + 1):
        changed = False
        for tail, head, cost in arcs:
            if distance[tail] + cost < distance[head]:
                distance[head] = distance[tail] + cost
                changed = True
        if not changed:
            return True
    return False


def groups(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def tiles(
    shape: tuple[int, ...], m: int, saturated: bool, direction: str
) -> Iterator[tuple[tuple[int | slice, ...], bool, bool]]:
    """Where each tile of a matrix, or a stack of them, lies, and whether its rows and columns hold exactly n."""
    for lead in np.ndindex(shape[:-2]):
        for rows in groups(shape[-2], 1 if direction == "rows" else m):
            for columns in groups(shape[-1], 1 if direction == "columns" else m):
                exact_rows = saturated and direction != "columns" and columns.stop - columns.start == m
                exact_columns = saturated and direction != "rows" and rows.stop - rows.start == m
                yield (*lead, rows, columns), exact_rows, exact_columns


def is_valid(mask: NDArray[Any], n: int, m: int, saturated: bool = True, direction: str = "both") -> bool:
    """Whether all groups of a mask hold at most n, and whole groups exactly n if saturated."""
    return all(is_valid_tile(mask[where], n, *exact) for where, *exact in tiles(mask.shape, m, saturated, direction))


def is_optimal(
    weights: NDArray[Any], mask: NDArray[Any], n: int, m: int, saturated: bool = True, direction: str = "both"
) -> bool:
    """Whether a mask of a whole matrix, or of a stack of them, is valid and optimal in every tile."""
    return all(
        is_optimal_tile(weights[where], mask[where], n, *exact)
        for where, *exact in tiles(weights.shape, m, saturated, direction)
    )
