"""Cuts matrices into tiles for those peers that take a batch of tiles, and measures masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PATTERNS = ((2, 4), (1, 4), (4, 8), (2, 8), (8, 16), (16, 32))


@dataclass(frozen=True)
class Sample:
    """The same weights twice: as a matrix (R, C), and as contiguous tiles (B, m, m)."""

    matrix: NDArray[np.float32]
    tiles: NDArray[np.float32]


def sample(matrix: NDArray[np.float32], m: int, count: int) -> Sample:
    """Take about this many tiles from the top of a matrix: whole tile rows, or a part of the first."""
    tile_rows, per_row = matrix.shape[0] // m, matrix.shape[1] // m
    rows = min(tile_rows, max(1, count // per_row))
    columns = per_row if count >= per_row else count
    part = matrix[: rows * m, : columns * m]
    return Sample(part, to_tiles(part, m))


def to_tiles(matrix: NDArray[Any], m: int) -> NDArray[Any]:
    """Tiles (B, m, m) of a matrix whose sides are multiples of m."""
    rows, columns = matrix.shape
    grid = matrix.reshape(rows // m, m, columns // m, m).swapaxes(1, 2)
    return np.ascontiguousarray(grid).reshape(-1, m, m)


def kept(tiles: NDArray[np.float32], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return what every mask keeps of its tile: the sum of abs(weights) under its ones."""
    return np.abs(tiles).sum(axis=(1, 2), dtype=np.float64, where=masks)


def faults(masks: NDArray[np.bool_], n: int) -> tuple[float, float]:
    """Share of masks with a line of more than n (invalid), and of the others with one of fewer (unfilled)."""
    sums = np.concatenate([masks.sum(axis=1), masks.sum(axis=2)], axis=1)
    invalid = (sums > n).any(axis=1)
    unfilled = (sums < n).any(axis=1) & ~invalid
    return float(invalid.mean()), float(unfilled.mean())
