"""Walks a grid of tiles in chunks of bounded size, on several threads, as float64 importance."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from masksolve._cores import usable_cores
from masksolve._errors import UnusableWeightError
from masksolve._floating_point import IeeeArithmetic
from masksolve._inputs import LARGEST_INTEGER

# One chunk's importance takes half a MiB: it stays in the second-level cache, and threads share the work evenly.
_CHUNK_WEIGHTS = 1 << 16

Piece = tuple[slice, slice]
_Piece = TypeVar("_Piece")


class Buffers(threading.local):
    """Arrays of each thread that are used for one piece after the other: fresh memory takes as long as judging."""

    def __init__(self) -> None:
        self.held: dict[str, NDArray[Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        size, held = math.prod(shape), self.held.get(name)
        if held is None or held.size < size or held.dtype != dtype:
            held = self.held[name] = np.empty(size, dtype)
        return held[:size].reshape(shape)


def importance_of(tiles: NDArray[Any]) -> NDArray[np.float64]:
    """Return |weights| in a new contiguous float64 array; every accepted dtype is exact in it."""
    refuse_large_integers(tiles)
    importance = np.array(tiles, dtype=np.float64, order="C")
    np.abs(importance, out=importance)
    if not importance.max() < np.inf:
        raise UnusableWeightError
    return importance


def refuse_large_integers(tiles: NDArray[Any]) -> None:
    """Raise UnusableWeightError for integers that float64 does not hold."""
    is_long = tiles.dtype.kind in "iu" and tiles.dtype.itemsize == 8
    if is_long and max(int(tiles.max()), -int(tiles.min())) > LARGEST_INTEGER:
        raise UnusableWeightError


def for_each_chunk(work: Callable[[Piece], None], shape: tuple[int, ...], threads: int | None) -> None:
    """Call work(piece) for pieces that together cover a grid of tiles (P, Q, r, c)."""
    run_pieces(work, pieces_of(shape, _CHUNK_WEIGHTS), threads)


def pieces_of(shape: tuple[int, ...], weights: int) -> list[Piece]:
    """Return indices of the first two axes of a grid of tiles (P, Q, r, c), for pieces of about `weights` weights."""
    tiles_at_once = max(1, weights // (shape[2] * shape[3]))
    across = min(shape[1], tiles_at_once)
    down = max(1, tiles_at_once // across)
    return [
        (slice(p, p + down), slice(q, q + across)) for p in range(0, shape[0], down) for q in range(0, shape[1], across)
    ]


def run_pieces(work: Callable[[_Piece], None], pieces: Sequence[_Piece], threads: int | None) -> None:
    """Call work(piece) for every piece, on several threads, this one among them; an error leaves the rest undone."""
    workers = min(threads or usable_cores(), len(pieces))
    remaining = deque(pieces)

    # Threads take pieces themselves: to wake this one for each that is done costs a third of a second core.
    def take_pieces() -> None:
        # A thread of its own has a floating-point mode of its own.
        with IeeeArithmetic():
            try:
                while (piece := _next_of(remaining)) is not None:
                    work(piece)
            except BaseException:
                remaining.clear()
                raise

    if workers <= 1:
        take_pieces()
        return
    with ThreadPoolExecutor(workers - 1) as pool:
        try:
            others = [pool.submit(take_pieces) for _ in range(workers - 1)]
            take_pieces()
            for other in others:
                other.result()
        except BaseException:
            # An interrupt that comes while this thread waits; leaving the pool waits for the others.
            remaining.clear()
            raise


def _next_of(pieces: deque[_Piece]) -> _Piece | None:
    try:
        return pieces.popleft()
    except IndexError:  # another thread took the last
        return None
