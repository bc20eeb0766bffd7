"""Method "enumerate": every valid mask scored, the best one kept. The plainest proof there is, for small tiles.

For 2:4 these are the 90 masks that Hu et al. 2024 (arXiv 2404.01847) score as one matrix product, as here. Sums are
float64: masks whose importance agrees to the last bit of it count as equal.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._threads import Piece, for_each_chunk, importance_of
from masksolve._tiles import Margins
from masksolve.diversity._count import count_masks, log10_states

# The list of masks, a byte an entry, stays below 32 MiB. It is scored in slices of a MiB of float64.
_MEMORY_LIMIT = 32 << 20
_SLICE = 1 << 17
# Tiles whose masks take more than 0.1 s to count have far too many to list.
_LOG10_STATES = 5.0


def solve(tiles: NDArray[Any], masks: NDArray[np.bool_], margins: Margins, *, threads: int | None) -> None:
    """Fill masks (P, Q, r, c) with optimal masks of tiles (P, Q, r, c); ValueError if there are too many to list."""
    rows, cols = tiles.shape[2:]
    _refuse_too_many(rows, cols, margins)
    candidates = _all_masks(rows, cols, margins)

    def work(piece: Piece) -> None:
        importance = importance_of(tiles[piece])
        # A power of two that keeps sums of the largest float64 weights finite.
        _, exponents = np.frexp(importance.max(axis=(2, 3), keepdims=True))
        scores = np.ldexp(importance, -exponents).reshape(-1, rows * cols)
        masks[piece] = candidates[_best_of(candidates, scores)].reshape(importance.shape)

    for_each_chunk(work, tiles.shape, threads)


def _refuse_too_many(rows: int, cols: int, margins: Margins) -> None:
    countable = log10_states(rows, cols, margins) <= _LOG10_STATES
    count = count_masks(rows, cols, margins) if countable else None
    if count is None or count * rows * cols > _MEMORY_LIMIT:
        many = "more masks than can be counted here" if count is None else f"{count:,} masks"
        raise ValueError(
            f"a {rows}x{cols} tile that keeps {margins.kept} per line has {many}; method 'enumerate' lists at most "
            f"{_MEMORY_LIMIT >> 20} MiB of them, {_MEMORY_LIMIT // (rows * cols):,} masks; use method='exact'"
        )


@functools.lru_cache(maxsize=8)
def _all_masks(rows: int, cols: int, margins: Margins) -> NDArray[np.bool_]:
    """Return all valid masks of a tile, flattened: (number of masks, rows * cols)."""
    kept = margins.kept
    fewest = kept if margins.exact_rows else 0
    choices = np.array(
        [
            np.isin(np.arange(cols), columns)
            for ones in range(fewest, min(kept, cols) + 1)
            for columns in itertools.combinations(range(cols), ones)
        ]
    )
    partial = np.zeros((1, 0, cols), np.bool_)
    for remaining in reversed(range(rows)):
        extended = []
        loads = partial.sum(axis=1)
        for choice in choices:
            after = loads + choice
            possible = (after <= kept).all(axis=1)
            if margins.exact_columns:
                possible &= (after + remaining >= kept).all(axis=1)
            row = np.broadcast_to(choice, (int(possible.sum()), 1, cols))
            extended.append(np.concatenate([partial[possible], row], axis=1))
        partial = np.concatenate(extended)
    return partial.reshape(len(partial), rows * cols)


def _best_of(candidates: NDArray[np.bool_], importance: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the index of the best candidate for every tile of importance (tiles, rows * cols)."""
    best = np.zeros(len(importance), np.intp)
    best_score = np.full(len(importance), -1.0)
    at_once = max(1, _SLICE // max(importance.shape))
    for start in range(0, len(candidates), at_once):
        scores = importance @ candidates[start : start + at_once].T.astype(np.float64)
        winner = scores.argmax(axis=1)
        score = scores[np.arange(len(scores)), winner]
        better = score > best_score
        best[better] = start + winner[better]
        best_score[better] = score[better]
    return best
