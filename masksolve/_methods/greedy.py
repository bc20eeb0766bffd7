"""Method "greedy": entries in descending order, kept while their row and their column have room.

Source: what the training code of Hubara et al. 2021 and most libraries run. It keeps at least half of the at-most-N
optimum, usually 98 %, and often stops with lines short of N, from which no further entry can be added.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._inputs import check_flag
from masksolve._jit import inner_kernel, kernel
from masksolve._threads import Piece, for_each_chunk, importance_of
from masksolve._tiles import Margins


def solve(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    *,
    threads: int | None,
    complete: bool = False,
) -> None:
    """Fill masks greedily; with `complete`, fill up lines that must hold exactly N by augmenting paths."""
    check_flag(complete, "complete")
    fill_rows, fill_columns = complete and margins.exact_rows, complete and margins.exact_columns

    def work(piece: Piece) -> None:
        importance = importance_of(tiles[piece])
        chunk = np.zeros(importance.shape, np.bool_)
        _solve_tiles(importance, margins.kept, fill_rows, fill_columns, chunk)
        masks[piece] = chunk

    for_each_chunk(work, tiles.shape, threads)


@kernel
def _solve_tiles(
    importance: NDArray[np.float64], kept: int, fill_rows: bool, fill_columns: bool, masks: NDArray[np.bool_]
) -> None:
    down, across, rows, cols = importance.shape
    row_room = np.empty(rows, np.int64)
    column_room = np.empty(cols, np.int64)
    for p in range(down):
        for q in range(across):
            row_room[:] = kept
            column_room[:] = kept
            mask = masks[p, q]
            for entry in np.argsort(-importance[p, q].ravel(), kind="mergesort"):
                i, j = entry // cols, entry % cols
                if row_room[i] > 0 and column_room[j] > 0:
                    mask[i, j] = True
                    row_room[i] -= 1
                    column_room[j] -= 1
            if fill_rows:
                for i in range(rows):
                    while row_room[i] > 0:
                        _fill_row(mask, i, row_room, column_room)
            # A tile whose rows and columns must both be full is square: full rows fill the columns.
            elif fill_columns:
                for j in range(cols):
                    while column_room[j] > 0:
                        _fill_row(mask.T, j, column_room, row_room)


@inner_kernel
def _fill_row(mask: NDArray[np.bool_], short: int, row_room: NDArray[np.int64], column_room: NDArray[np.int64]) -> None:
    """Give row `short` one more entry: it takes a column, from a row that takes another, ..., along a shortest path."""
    rows, cols = mask.shape
    from_row = np.full(cols, -1, np.int64)
    queue = np.empty(rows, np.int64)
    reached_by = np.full(rows, -1, np.int64)
    queue[0] = short
    head, tail = 0, 1
    while True:
        i = queue[head]
        head += 1
        for j in range(cols):
            if mask[i, j] or from_row[j] >= 0:
                continue
            from_row[j] = i
            if column_room[j] > 0:
                column_room[j] -= 1
                while True:
                    mask[i, j] = True
                    if i == short:
                        break
                    j = reached_by[i]
                    mask[i, j] = False
                    i = from_row[j]
                row_room[short] -= 1
                return
            for k in range(rows):
                if mask[k, j] and k != short and reached_by[k] < 0:
                    reached_by[k] = j
                    queue[tail] = k
                    tail += 1
