"""All 90 masks of a 2:4 tile scored by one matrix product: a re-implementation from its description.

Hu et al. 2024 (arXiv 2404.01847): |w| as (B, 16) times the masks as (16, 90), and the best column of every row.
Exact up to the rounding of the product, which is float32. With PyTorch, or with NumPy where that is not installed.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

try:
    import torch
except ImportError:
    torch = None  # type: ignore[assignment]

# Tiles are taken in chunks whose scores stay in the cache, which is faster than all of them at once.
_CHUNK_TILES = 1 << 13


def _all_masks() -> NDArray[np.bool_]:
    """List the 90 masks, an array (90, 16)."""
    lines = [line for line in itertools.product((False, True), repeat=4) if sum(line) == 2]
    masks = np.array(list(itertools.product(lines, repeat=4)))
    return masks[(masks.sum(axis=1) == 2).all(axis=1)].reshape(-1, 16)


_MASKS = _all_masks()
_TABLE = np.ascontiguousarray(_MASKS.T, dtype=np.float32)


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """Find the best 2:4 mask of every 4x4 tile."""
    if (n, *tiles.shape[1:]) != (2, 4, 4):
        raise ValueError(f"the mask product is for 2:4 alone, not {n} of {tiles.shape[1:]}")
    flat = tiles.reshape(-1, 16)
    masks = _with_numpy(flat) if torch is None else _with_torch(flat)
    return masks.reshape(-1, 4, 4)


def _with_numpy(flat: NDArray[np.float32]) -> NDArray[np.bool_]:
    best = np.empty(len(flat), np.intp)
    for start in range(0, len(flat), _CHUNK_TILES):
        piece = slice(start, start + _CHUNK_TILES)
        (np.abs(flat[piece]) @ _TABLE).argmax(axis=1, out=best[piece])
    return _MASKS[best]


def _with_torch(flat: NDArray[np.float32]) -> NDArray[np.bool_]:
    table = torch.from_numpy(_TABLE)
    best = [(chunk.abs() @ table).argmax(dim=1) for chunk in torch.from_numpy(flat).split(_CHUNK_TILES)]
    return torch.from_numpy(_MASKS)[torch.cat(best)].numpy()
