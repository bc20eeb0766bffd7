"""PyTorch's greedy on 4x4 tiles, in NumPy: a re-implementation from its description.

PyTorch (and xFormers before it) prunes to 2:4 both ways by a greedy that holds a 4x4 tile in registers: entries in
descending order of magnitude, each kept while its row and column have fewer than two. Its kernels need CUDA. Here a
tile's mask is a 16-bit number, and a table says which entries still fit it: the masks are PyTorch's, not the time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _entries_that_fit() -> NDArray[np.uint16]:
    """For each of the 65,536 masks of a tile, the entries whose row and column have room, as a mask too."""
    states = np.arange(1 << 16, dtype=np.uint32)
    bits = (states[:, None] >> np.arange(16) & 1).reshape(-1, 4, 4)
    room = (bits.sum(axis=2) < 2)[:, :, None] & (bits.sum(axis=1) < 2)[:, None, :]
    return (room.reshape(-1, 16) << np.arange(16)).sum(axis=1).astype(np.uint16)


_FITS = _entries_that_fit()


def solve(tiles: NDArray[np.float32], n: int) -> NDArray[np.bool_]:
    """2:4 masks of 4x4 tiles; some lines may hold fewer than two."""
    if (n, *tiles.shape[1:]) != (2, 4, 4):
        raise ValueError(f"PyTorch's tile greedy is for 2:4 alone, not {n} of {tiles.shape[1:]}")
    order = np.argsort(-np.abs(tiles).reshape(-1, 16), axis=1).T
    entries = np.left_shift(1, order).astype(np.uint16)
    state = np.zeros(len(tiles), np.uint16)
    for entry in entries:
        state |= entry & _FITS[state]
    return (state[:, None] >> np.arange(16, dtype=np.uint16) & 1).astype(np.bool_).reshape(-1, 4, 4)
