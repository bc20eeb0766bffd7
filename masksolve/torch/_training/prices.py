"""The prices that an exact mask leaves undetermined, chosen so that they follow the weights continuously.

A mask keeps the most of c = abs(w), with N entries in every row and column, exactly where prices u of the rows and v of
the columns exist with c >= u + v inside the mask and c <= u + v outside. So max(c - u - v, 0) is zero outside the mask,
and where an entry enters or leaves the mask it is zero inside too. Prices are not unique: those of a tile are all
solutions y = (u, -v) of inequalities between two numbers each, y_q - y_p <= d_pq, which shortest paths make tight.

For each row as an anchor there is a solution in which all columns are cheapest relative to it, and for each column one
in which all rows are. The prices here are the mean of these 2M. They are optimal, as optimal prices are convex; they do
not depend on which of several optimal masks is given; they follow permutations and transposition of the tile; and they
are continuous, as the lengths of shortest paths are minima of sums of entries. `docs/soft.md` has the argument. For one
row alone they would be its (N+1)-th largest entry, as S-STE takes (Hu et al. 2024, arXiv 2409.09099).
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksolve._pattern import Pattern

# Entries of a part whose M x M matrices stay in a core's cache.
_CACHED = 1 << 16
_AT_ONCE = 1 << 24


def thresholds(weights: Tensor, masks: Tensor, pattern: Pattern) -> Tensor:
    """Return u + v where that is positive and zero elsewhere, for matrices (..., R, C) of whole tiles.

    Prices of exactly N ones may be negative. An entry that has to be kept though it is small would grow by them, and
    jump where its weight changes sign; a threshold of zero leaves it as it is.

    Parameters
    ----------
    weights : Tensor, shape (..., R, C)
        Float of any kind; R and C are multiples of M.
    masks : Tensor of bool, shape (..., R, C)
        Optimal, with exactly N ones in every row and column of a tile.

    Returns
    -------
    Tensor of float32, or float64 like the weights, shape (..., R, C)
    """
    n, m = pattern.n, pattern.m
    if not 0 < n < m:
        return torch.zeros_like(weights, dtype=torch.promote_types(weights.dtype, torch.float32))
    # A tile's index last, so that every operation runs along it.
    sizes = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    sizes, kept = (_tiles_last(each, m) for each in (sizes.abs(), masks))
    found = torch.empty_like(sizes)
    at_once = max(1, (_CACHED if weights.device.type == "cpu" else _AT_ONCE) // m**2)
    for size, mask, target in zip(*(each.split(at_once, dim=2) for each in (sizes, kept, found)), strict=True):
        u, v = prices(size, mask)
        target.copy_((u[:, None] + v).clamp_(min=0))
    *lead, rows, columns = weights.shape
    tiles = found.view(m, m, -1, rows // m, columns // m)
    return tiles.permute(2, 3, 0, 4, 1).reshape(*lead, rows, columns)


def prices(sizes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prices of the rows and of the columns, (m, tiles) each, of tiles (m, m, tiles) and optimal masks."""
    inside = torch.where(masks, sizes, torch.inf).transpose(0, 1)
    outside = torch.where(masks, torch.inf, -sizes)
    # From row to row by way of a column outside the mask, and a row that has it inside.
    by_rows = _shortest(_least_sums(outside, inside))
    rows_to_columns = _least_sums(by_rows, outside)
    by_columns = _no_way_back(_least_sums(inside, rows_to_columns))
    u = (by_rows.mean(0) - rows_to_columns.mean(1)) / 2
    v = (by_columns.mean(1) - rows_to_columns.mean(0)) / 2
    return u, v


def _tiles_last(matrices: Tensor, m: int) -> Tensor:
    *_, rows, columns = matrices.shape
    tiles = matrices.reshape(-1, rows // m, m, columns // m, m)
    return tiles.permute(2, 4, 0, 1, 3).reshape(m, m, -1)


def _least_sums(first: Tensor, second: Tensor) -> Tensor:
    """Return min over k of first[p, k] + second[k, q]."""
    found = first[:, 0, None] + second[0]
    for k in range(1, first.shape[1]):
        torch.minimum(found, first[:, k, None] + second[k], out=found)
    return found


def _shortest(lengths: Tensor) -> Tensor:
    """Return the lengths of the shortest paths between all nodes, by Floyd and Warshall."""
    found = _no_way_back(lengths)
    for k in range(len(found)):
        torch.minimum(found, found[:, k, None] + found[k], out=found)
    return found


def _no_way_back(lengths: Tensor) -> Tensor:
    """Let every node reach itself for nothing."""
    diagonal = lengths.diagonal(dim1=0, dim2=1)
    diagonal.clamp_(max=0)
    return lengths
