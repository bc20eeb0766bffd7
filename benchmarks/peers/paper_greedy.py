"""The paper's training-time greedy in PyTorch, vectorised over tiles: a re-implementation from its description.

Hubara et al. 2021 (arXiv 2102.08124): sort a tile's entries in descending order and keep each one while its row and its
column have room. All tiles take the k-th step at once, so that there are m * m steps of a few tensor operations each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# Tiles are taken in chunks whose arrays stay in the cache, which is faster than all of them at once.
_CHUNK_WEIGHTS = 1 << 19


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """Masks with at most n ones in every line; some lines may hold fewer."""
    chunks = torch.from_numpy(tiles).split(max(1, _CHUNK_WEIGHTS // tiles[0].size))
    return torch.cat([greedy(chunk.abs(), n) for chunk in chunks]).numpy()


def greedy(scores: torch.Tensor, n: int) -> torch.Tensor:
    """Keep entries (B, m, m) in descending order while their lines have room."""
    count, m, _ = scores.shape
    # Step first, so that what one step needs is contiguous.
    order = scores.reshape(count, m * m).argsort(dim=1, descending=True).T.contiguous()
    tile = torch.arange(count)
    rows = tile * m + order // m
    columns = tile * m + order % m
    row_room = torch.full((count * m,), n, dtype=torch.int32)
    column_room = torch.full((count * m,), n, dtype=torch.int32)
    keeps = torch.empty(order.shape, dtype=torch.bool)
    for step in range(m * m):
        row, column = rows[step], columns[step]
        row_left, column_left = row_room[row], column_room[column]
        fits = (row_left > 0) & (column_left > 0)
        keeps[step] = fits
        taken = fits.int()
        row_room[row] = row_left - taken
        column_room[column] = column_left - taken
    masks = torch.empty((m * m, count), dtype=torch.bool).scatter_(0, order, keeps)
    return masks.T.reshape(count, m, m).contiguous()
