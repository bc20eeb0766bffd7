"""Walks a grid of tiles in chunks of bounded size, on several threads, as float64 importance."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

# One chunk's importance takes half a MiB: it stays in the second-level cache, and threads share the work evenly.
_CHUNK_WEIGHTS = 1 << 16

Piece = tuple[slice, slice]


def importance_of(tiles: NDArray[Any]) -> NDArray[np.float64]:
    """|weights| in a new contiguous float64 array; every accepted dtype is exact in it."""
    importance = np.array(tiles, dtype=np.float64, order="C")
    return np.abs(importance, out=importance)


def usable_cores() -> int:
    """The cores this process may run on, which containers and `taskset` make fewer than the machine's."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def for_each_chunk(work: Callable[[Piece], None], shape: tuple[int, ...], threads: int | None) -> None:
    """Call work(piece) for index pieces that together cover the first two axes of a grid of tiles (P, Q, r, c)."""
    tiles_at_once = max(1, _CHUNK_WEIGHTS // (shape[2] * shape[3]))
    across = min(shape[1], tiles_at_once)
    down = max(1, tiles_at_once // across)
    pieces = [
        (slice(p, p + down), slice(q, q + across)) for p in range(0, shape[0], down) for q in range(0, shape[1], across)
    ]
    workers = min(threads or usable_cores(), len(pieces))
    if workers == 1:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(work, pieces):
            pass
