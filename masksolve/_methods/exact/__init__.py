"""Method "exact": an optimal mask of every tile, with potentials that prove it, whatever the weights.

Source: the min-cost flow of Hubara et al. 2021 (arXiv 2102.08124), of which this solves the dual.

Whole tiles up to 64x64 are equilibrated many at a time (`equilibrate`), in float32 where that holds the weights
and in float64 otherwise. The few that are not certified there, ragged edges, and larger tiles are solved one at a
time by augmenting paths (`augment`), in 64-bit integers: for weights of any magnitude, and however they tie.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._errors import UnusableWeightError
from masksolve._inputs import potentials_dtype
from masksolve._jit import kernel
from masksolve._methods.exact.augment import solve_tiles
from masksolve._methods.exact.equilibrate import equilibrate_tiles
from masksolve._methods.exact.lines import choose_largest
from masksolve._threads import Piece, importance_of, pieces_of, refuse_large_integers, run_pieces
from masksolve._tiles import Margins

_logger = logging.getLogger("masksolve")

# Words of 64 bits hold a row of a mask.
_LARGEST_EQUILIBRATED = 64
# Weights that one call of a kernel takes: from where they lie, from a converted copy, and of tiles that are solved one
# at a time. An interrupt waits for the end of such a call.
_WEIGHTS_IN_PLACE = 1 << 18
_WEIGHTS_CONVERTED = 1 << 17
_WEIGHTS_ONE_BY_ONE = 1 << 13
# Measured on Gaussian tiles of 65 to 256: more rounds cost more than the augmenting paths that they save.
_ROUNDS, _RELAXATION = 8, 1.5


def solve(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    *,
    threads: int | None,
    potentials: NDArray[np.floating[Any]] | None = None,
    warm: bool = False,
) -> None:
    """Fill masks (P, Q, r, c) with optimal masks of tiles (P, Q, r, c).

    `potentials` (P, Q, c) is filled with column potentials; where `warm`, it holds those to start from.
    """
    rows, cols = tiles.shape[2:]
    if rows == 1 or cols == 1:
        _choose_in_lines(tiles, masks, margins.kept, threads)
    elif not _is_equilibrated(tiles.shape, margins):

        def work(piece: Piece) -> None:
            importance = importance_of(tiles[piece])
            start = potentials[piece] if potentials is not None and warm else _start(importance, margins)
            masks[piece], found, _ = solve_importance(importance, margins, start)
            if potentials is not None:
                with np.errstate(all="ignore"):  # beyond the ends of float32; `solve_matrix` clips what it returns
                    potentials[piece] = found

        run_pieces(work, pieces_of(tiles.shape, _WEIGHTS_ONE_BY_ONE), threads)
    else:
        _equilibrate(tiles, masks, margins, threads, potentials, warm)


def _is_equilibrated(shape: tuple[int, ...], margins: Margins) -> bool:
    rows, cols = shape[2:]
    return rows == cols and 0 < margins.kept < rows <= _LARGEST_EQUILIBRATED


def _start(importance: NDArray[np.float64], margins: Margins) -> NDArray[np.float64]:
    down, across, rows, cols = importance.shape
    # Smaller tiles are solved sooner than potentials are found.
    if min(rows, cols) <= _LARGEST_EQUILIBRATED:
        return np.zeros((down, across, cols))
    start: NDArray[np.float64] = _approach(importance, margins.kept, margins.exact_rows, margins.exact_columns)
    return start


def _choose_in_lines(tiles: NDArray[Any], masks: NDArray[np.bool_], kept: int, threads: int | None) -> None:
    dtype = potentials_dtype(tiles.dtype)
    is_row = tiles.shape[2] == 1

    def work(piece: Piece) -> None:
        part = tiles[piece]
        if tiles.dtype != dtype or not tiles.dtype.isnative:
            part = converted(part, dtype)
        lines, chosen = (part[:, :, 0], masks[piece][:, :, 0]) if is_row else (part[..., 0], masks[piece][..., 0])
        if not choose_largest(lines, chosen, kept):
            raise UnusableWeightError

    run_pieces(work, pieces_of(tiles.shape, _WEIGHTS_CONVERTED), threads)


def _equilibrate(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    threads: int | None,
    potentials: NDArray[Any] | None,
    warm: bool,
) -> None:
    dtype = potentials_dtype(tiles.dtype)
    in_place = (
        tiles.dtype == dtype and tiles.dtype.isnative and tiles.flags.aligned and tiles.strides[3] == dtype.itemsize
    )

    def work(part: NDArray[Any], part_masks: NDArray[np.bool_], part_potentials: NDArray[Any] | None) -> None:
        if not in_place:
            part = converted(part, dtype)
        if part_potentials is None:
            _equilibrate_piece(part, part_masks, margins, None, warm)
        else:
            found = part_potentials.reshape(-1, part.shape[3])
            _equilibrate_piece(part, part_masks, margins, found, warm)
            part_potentials[...] = found.reshape(part_potentials.shape)

    at_once = _WEIGHTS_IN_PLACE if in_place else _WEIGHTS_CONVERTED
    if tiles.size <= at_once:
        work(tiles, masks, potentials)
    else:

        def work_on(piece: Piece) -> None:
            work(tiles[piece], masks[piece], None if potentials is None else potentials[piece])

        run_pieces(work_on, pieces_of(tiles.shape, at_once), threads)


def converted(tiles: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return tiles of any dtype and strides as an array of tile rows that lie one after the other."""
    refuse_large_integers(tiles)
    down, across, height, width = tiles.shape
    rows = np.empty((down, height, across, width), dtype)
    # A bfloat16 is the upper half of a float32; NumPy converts it one by one.
    if tiles.dtype.name == "bfloat16" and tiles.dtype.isnative:
        bits = rows.view(np.uint32)
        bits[...] = tiles.view(np.uint16).swapaxes(1, 2)
        bits <<= 16
    else:
        rows[...] = tiles.swapaxes(1, 2)
    return rows.swapaxes(1, 2)


def _equilibrate_piece(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    potentials: NDArray[Any] | None,
    warm: bool,
) -> None:
    remaining = equilibrate_tiles(tiles, masks, margins, potentials, warm)
    if remaining is None:
        return
    down, across = tiles.shape[:2]
    _logger.debug("%d of %d tiles left to augmenting paths", len(remaining.where), down * across)
    where = remaining.where >> 32, remaining.where & 0xFFFFFFFF
    start = remaining.potentials[np.newaxis]
    solved, ends, _ = solve_importance(importance_of(tiles[where])[np.newaxis], margins, start)
    masks[where] = solved[0]
    if potentials is not None:
        with np.errstate(all="ignore"):  # beyond the ends of float32; `solve_matrix` clips what it returns
            potentials[where[0] * across + where[1]] = ends[0]


def solve_importance(
    importance: NDArray[np.float64],
    margins: Margins,
    start: NDArray[np.floating[Any]] | None = None,
    judged: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    """Solve tiles of importance (p, q, r, c) one at a time, by augmenting paths.

    Returns optimal masks (p, q, r, c), column potentials (p, q, c) of an optimal dual solution, rounded to float64,
    and whether the masks `judged` (p, q, r, c), which are the optimal ones if none are given, are optimal (p, q).
    `start` (p, q, c) are potentials to start from.
    """
    shape = importance.shape
    if judged is None:
        # Of equal entries a row keeps those it has; this spreads the ties of a constant tile evenly.
        spread = (np.arange(shape[3]) - np.arange(shape[2])[:, np.newaxis]) % shape[3] < margins.kept
        masks = np.broadcast_to(spread, shape).copy()
    else:
        masks = judged.copy()
    potentials = np.zeros((*shape[:2], shape[3])) if start is None else start.astype(np.float64)
    optimal = np.zeros(shape[:2], np.bool_)
    sums = margins.kept, margins.exact_rows, margins.exact_columns
    for piece in pieces_of(shape, _WEIGHTS_ONE_BY_ONE):
        to_judge = masks[piece] if judged is None else judged[piece]
        optimal[piece] = solve_tiles(importance[piece], *sums, to_judge, masks[piece], potentials[piece])
    return masks, potentials, optimal


@kernel
def _approach(importance: NDArray[np.float64], kept: int, exact_rows: bool, exact_columns: bool) -> NDArray[np.float64]:
    """Return column potentials (p, q, c) to start from: of a few rounds of equilibration, one tile after the other."""
    down, across, rows, cols = importance.shape
    potentials = np.zeros((down, across, cols))
    for p in range(down):
        for q in range(across):
            c, v = importance[p, q], potentials[p, q]
            u = np.zeros(rows)
            for _ in range(_ROUNDS):
                _move(c, v, u, kept, exact_rows)
                _move(c.T, u, v, kept, exact_columns)
    return potentials


@kernel
def _move(
    c: NDArray[np.float64], across: NDArray[np.float64], along: NDArray[np.float64], kept: int, exact: bool
) -> None:
    """Move the potentials along to the middle between the kept-th and the following reduced entry, and beyond."""
    length = c.shape[1]
    if not 0 < kept < length:
        return
    for i in range(len(along)):
        reduced = np.partition(c[i] - across, length - kept)
        middle = 0.5 * (reduced[length - kept] + reduced[: length - kept].max())
        along[i] += _RELAXATION * (middle - along[i])
        if not exact:
            along[i] = max(along[i], 0.0)
