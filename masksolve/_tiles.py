"""Matrix <-> tiles: the only place that knows geometry, ragged edges and convolution layouts.

A matrix is cut into at most four regions, in each of which all tiles have one shape: the interior, the
bottom and right edges, and the corner. Nothing is ever padded: a tile at a ragged edge is a smaller rectangle.
One-sided N:M is the same problem on tiles of one row (or one column).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from masksolve._pattern import Pattern

Direction = Literal["both", "rows", "columns"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_ACROSS: dict[Direction, Direction] = {"both": "both", "rows": "columns", "columns": "rows"}


def across(direction: Direction) -> Direction:
    """Return the direction of the transposed matrix's groups."""
    return _ACROSS[direction]


@dataclass(frozen=True)
class Margins:
    """The margins of one tile: how many ones its rows and columns may hold.

    No line holds more than `kept` ones; rows hold exactly that many where `exact_rows`, columns where
    `exact_columns`. Both are exact in a full tile under `saturated=True`, neither under
    `saturated=False`, and one of them in a ragged tile whose other lines are partial groups.

    `group` is how many entries a line of a full tile has; by default, what the longer lines of the tile have.
    """

    kept: int
    exact_rows: bool
    exact_columns: bool
    group: int | None = None


@dataclass(frozen=True)
class Region:
    """A rectangle of the matrix that equal tiles fill."""

    rows: slice
    columns: slice
    tile_shape: tuple[int, int]
    margins: Margins

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Tiles from top to bottom, and from left to right."""
        height, width = self.tile_shape
        return (self.rows.stop - self.rows.start) // height, (self.columns.stop - self.columns.start) // width


@lru_cache(maxsize=1024)
def regions(rows: int, columns: int, pattern: Pattern, direction: Direction, saturated: bool) -> tuple[Region, ...]:
    """Cut a rows x columns matrix into regions of equal tiles; together they cover it exactly once."""
    height = pattern.m if direction in ("both", "columns") else 1
    width = pattern.m if direction in ("both", "rows") else 1
    result = []
    for row_range, tile_rows in _ranges(rows, height):
        for column_range, tile_columns in _ranges(columns, width):
            margins = Margins(
                kept=pattern.n,
                exact_rows=saturated and direction != "columns" and tile_columns == pattern.m,
                exact_columns=saturated and direction != "rows" and tile_rows == pattern.m,
                group=pattern.m,
            )
            result.append(Region(row_range, column_range, (tile_rows, tile_columns), margins))
    return tuple(result)


def potentials_shape(shape: tuple[int, ...], m: int) -> tuple[int, ...]:
    """Return the shape of the column potentials of weights (..., R, C), whole tiles alone: (..., R // m, C // m, m)."""
    *lead, rows, columns = shape
    return (*lead, rows // m, columns // m, m)


def _ranges(length: int, group: int) -> list[tuple[slice, int]]:
    """Return the whole groups of an axis, and what is left over, as (where, group length)."""
    whole = length - length % group
    ranges = []
    if whole:
        ranges.append((slice(0, whole), group))
    if whole < length:
        ranges.append((slice(whole, length), length - whole))
    return ranges


def tile_grids(array: NDArray[Any], region: Region) -> Iterator[NDArray[Any]]:
    """Yield views (tile rows, tile columns, tile height, tile width) of a region of an array (..., R, C)."""
    height, width = region.tile_shape
    if array.ndim <= 3 and array.shape[-2:] == (height, width):
        # One tile, or a batch of them; small calls are made in loops.
        return iter([array[np.newaxis, np.newaxis] if array.ndim == 2 else array[:, np.newaxis]])
    part = array[..., region.rows, region.columns]
    rows, columns = part.shape[-2:]
    split = part.reshape(*part.shape[:-2], rows // height, height, columns // width, width)
    return grids(split.swapaxes(-3, -2), inner=2)


def grids(array: NDArray[Any], inner: int) -> Iterator[NDArray[Any]]:
    """Walk an array (..., tile rows, tile columns, and `inner` axes) in views that have two axes before the inner ones.

    The two longest axes are kept, so that a stack of many small matrices is as cheap as one large matrix. Arrays
    that differ in their inner axes only are walked alike.
    """
    if array.ndim == 2 + inner:
        yield array
        return
    outer_axes = range(array.ndim - inner)
    walked = sorted(outer_axes, key=lambda axis: array.shape[axis])[:-2]
    moved = np.moveaxis(array, walked, range(len(walked)))
    for index in np.ndindex(moved.shape[: len(walked)]):
        yield moved[index]


def convolution_matrices(weights: NDArray[Any]) -> NDArray[Any]:
    """Return a convolution weight (out, in, *kernel) as the stack of matrices (*kernel, out, in), a view.

    Each kernel position is a matrix of its own, which is what makes both the forward GEMM and the input-gradient
    GEMM of the lowered convolution N:M sparse.
    """
    return weights.transpose(convolution_axes(weights.ndim))


def convolution_axes(ndim: int, lead: int = 0) -> tuple[int, ...]:
    """Return the order of axes that turns weights (*lead, out, in, *kernel) into matrices (*kernel, *lead, out, in)."""
    return (*range(lead + 2, ndim), *range(lead + 2))
