"""Method "exact": an optimal mask of every tile, with potentials that prove it, whatever the weights.

Source: the min-cost flow of Hubara et al. 2021 (arXiv 2102.08124), of which this solves the dual.

Tiles of m up to 128, partial ones at ragged edges included, are equilibrated many at a time (`equilibrate`), in float32
where that holds the weights and in float64 otherwise. The few that are not certified there, and larger tiles, are
solved one at a time by augmenting paths (`augment`), in 64-bit integers: for weights of any magnitude, and however they
tie. Where only rows or only columns can be overfull, each line keeps its largest entries (`lines`).
"""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._errors import UnusableWeightError
from masksolve._inputs import potentials_dtype
from masksolve._methods.exact import halves
from masksolve._methods.exact.augment import new_memory, solve_tiles
from masksolve._methods.exact.equilibrate import LARGEST_NARROW, FewTiles, equilibrate_tiles
from masksolve._methods.exact.lanes import Tiles
from masksolve._methods.exact.lines import choose_largest, takes
from masksolve._threads import Buffers, Piece, importance_of, pieces_of, refuse_large_integers, run_pieces
from masksolve._tiles import Margins

_logger = logging.getLogger("masksolve")
_NO_BUFFERS = Buffers()

# For larger tiles a selection network takes too long to compile.
_LARGEST_EQUILIBRATED = 128
# Weights that one call of a kernel takes, from where they lie and of tiles that are solved one at a time, and bytes of
# a converted copy. An interrupt waits for the end of such a call.
_WEIGHTS_IN_PLACE = 1 << 18
_WEIGHTS_IN_LINES = 1 << 19
# Fewer large tiles than these are too few for slow ones to be deferred.
_WEIGHTS_IN_LARGE_TILES = 1 << 20
_BYTES_CONVERTED = 1 << 20
# So few are copied, and calls for as many shapes and patterns are kept.
_FEW_WEIGHTS = 1 << 12
_CALLS_HELD = 16
_WEIGHTS_ONE_BY_ONE = 1 << 13
# Smaller tiles that are solved one at a time are solved sooner than potentials are found to start from.
_LARGEST_FROM_ZERO = 64
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
    if tiles.size <= _FEW_WEIGHTS and potentials is None and _is_simple(rows, cols, margins):
        _solve_few(tiles, masks, margins)
    elif 0 < min(rows, cols) <= margins.kept:
        _choose_in_lines(tiles, masks, margins.kept, threads, potentials)
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
    return 0 < margins.kept < min(shape[2:]) and _group(shape, margins) <= _LARGEST_EQUILIBRATED


def _is_simple(rows: int, cols: int, margins: Margins) -> bool:
    return rows == cols == (margins.group or rows) and 0 < margins.kept < rows <= LARGEST_NARROW


class _FewTiles(threading.local):
    """Memory that each thread keeps from one call for few weights to the next: such calls are made in loops."""

    def __init__(self) -> None:
        self.held: dict[tuple[Any, ...], FewTiles] = {}

    def of(self, shape: tuple[int, ...], dtype: np.dtype[Any], margins: Margins) -> FewTiles:
        key = shape, dtype.itemsize, margins.kept, margins.exact_rows, margins.exact_columns
        found = self.held.get(key)
        if found is None:
            if len(self.held) >= _CALLS_HELD:
                self.held.clear()
            found = self.held[key] = FewTiles(shape, dtype, margins)
        return found


_few_tiles = _FewTiles()


def _solve_few(tiles: NDArray[Any], masks: NDArray[np.bool_], margins: Margins) -> None:
    refuse_large_integers(tiles)
    few = _few_tiles.of(tiles.shape, potentials_dtype(tiles.dtype), margins)
    # To copy them takes less time than to look where they are.
    few.tiles[...] = tiles
    remaining = few.solve()
    masks[...] = few.masks
    if remaining is not None:
        _solve_remaining(remaining, tiles, masks, margins, None)


def _group(shape: tuple[int, ...], margins: Margins) -> int:
    """Return how many entries a line of a full tile has."""
    return margins.group or max(shape[2:])


def _start(importance: NDArray[np.float64], margins: Margins) -> NDArray[np.float64]:
    down, across, rows, cols = importance.shape
    if min(rows, cols) <= _LARGEST_FROM_ZERO:
        return np.zeros((down, across, cols))
    return _approach(importance, margins)


def _choose_in_lines(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    kept: int,
    threads: int | None,
    potentials: NDArray[np.floating[Any]] | None,
) -> None:
    """Fill masks where lines along one axis never hold too many: those along the other keep their largest entries."""
    dtype = potentials_dtype(tiles.dtype)
    axis = 2 if tiles.shape[2] <= kept else 3
    in_place = takes(tiles.dtype, tiles.shape[5 - axis])
    buffers = Buffers()

    def work(piece: Piece) -> None:
        part = tiles[piece] if in_place else converted(tiles[piece], dtype, buffers)
        lines, chosen = (array.transpose(axis, 0, 1, 5 - axis) for array in (part, masks[piece]))
        for line, mask in zip(lines, chosen, strict=True):
            if not choose_largest(line, mask, kept):
                raise UnusableWeightError
        if potentials is not None:
            # A column that rows leave to itself is worth what the best of its other entries is.
            rest = np.where(masks[piece], 0, np.abs(part.astype(dtype, copy=False)))
            potentials[piece] = 0 if axis == 2 else rest.max(axis=2)

    run_pieces(
        work, pieces_of(tiles.shape, _WEIGHTS_IN_LINES if in_place else _BYTES_CONVERTED // dtype.itemsize), threads
    )


def _equilibrate(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    threads: int | None,
    potentials: NDArray[Any] | None,
    warm: bool,
) -> None:
    if potentials is None and abs(tiles.strides[2]) < abs(tiles.strides[3]):
        # In Fortran's order: the masks of the transpose are the transposed masks.
        tiles, masks = tiles.transpose(1, 0, 3, 2), masks.transpose(1, 0, 3, 2)
        margins = replace(margins, exact_rows=margins.exact_columns, exact_columns=margins.exact_rows)
    dtype = potentials_dtype(tiles.dtype)
    shape, m = tiles.shape[2:], _group(tiles.shape, margins)
    is_partial = shape != (m, m)
    copies_masks = is_partial or masks.strides[3] != 1
    in_place = (
        tiles.dtype == dtype
        and tiles.dtype.isnative
        and tiles.flags.aligned
        and tiles.strides[3] == dtype.itemsize
        and not is_partial
    )
    # Small calls are made in loops, and memory of each thread takes long to set up.
    buffers = _NO_BUFFERS if in_place and not copies_masks else Buffers()

    def work(part: NDArray[Any], part_masks: NDArray[np.bool_], part_potentials: NDArray[Any] | None) -> None:
        whole, whole_masks = part, part_masks
        if not in_place:
            whole = converted(part, dtype, buffers, (m, m))
        if copies_masks:
            whole_masks = buffers.array("masks", whole.shape, np.dtype(np.bool_))
        found = None
        if part_potentials is not None:
            found = np.zeros((len(part) * part.shape[1], m), dtype) if is_partial else part_potentials.reshape(-1, m)
        remaining = equilibrate_tiles(whole, whole_masks, shape, margins, found, warm)
        if copies_masks:
            part_masks[...] = whole_masks[:, :, : shape[0], : shape[1]]
        if part_potentials is not None and found is not None:
            part_potentials[...] = found.reshape(*part.shape[:2], m)[..., : shape[1]]
        if remaining is not None:
            _solve_remaining(remaining, part, part_masks, margins, part_potentials)

    at_once = _BYTES_CONVERTED // dtype.itemsize
    if in_place:
        at_once = _WEIGHTS_IN_PLACE if m <= 64 else _WEIGHTS_IN_LARGE_TILES
    if tiles.size <= at_once:
        work(tiles, masks, potentials)
    else:

        def work_on(piece: Piece) -> None:
            work(tiles[piece], masks[piece], None if potentials is None else potentials[piece])

        run_pieces(work_on, pieces_of(tiles.shape, at_once), threads)


def converted(
    tiles: NDArray[Any], dtype: np.dtype[Any], buffers: Buffers, shape: tuple[int, int] | None = None
) -> NDArray[Any]:
    """Return tiles of any dtype and strides as an array of tile rows that lie one after the other, in a buffer.

    What tiles lack of `shape` repeats their first entry.
    """
    refuse_large_integers(tiles)
    down, across, height, width = tiles.shape
    full_height, full_width = shape or (height, width)
    rows = buffers.array("converted", (down, full_height, across, full_width), dtype)
    own = rows[:, :height, :, :width]
    if halves.can_widen(tiles):
        halves.widen(tiles.swapaxes(1, 2), own)
    else:
        own[...] = tiles.swapaxes(1, 2)
    rows[:, :height, :, width:] = rows[:, height:] = rows[:, :1, :, :1]
    return rows.swapaxes(1, 2)


def _solve_remaining(
    remaining: Tiles,
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    potentials: NDArray[Any] | None,
) -> None:
    _logger.debug("%d of %d tiles left to augmenting paths", len(remaining.where), len(tiles) * tiles.shape[1])
    where = remaining.where >> 32, remaining.where & 0xFFFFFFFF
    start = remaining.potentials[np.newaxis, :, : tiles.shape[3]]
    # What the lanes chose last, by these potentials, for the perturbed tile: near an optimum where much ties.
    chosen = masks[where][np.newaxis]
    solved, ends, _ = solve_importance(importance_of(tiles[where])[np.newaxis], margins, start, chosen)
    masks[where] = solved[0]
    if potentials is not None:
        with np.errstate(all="ignore"):  # beyond the ends of float32; `solve_matrix` clips what it returns
            potentials[where] = ends[0]


def solve_importance(
    importance: NDArray[np.float64],
    margins: Margins,
    start: NDArray[np.floating[Any]] | None = None,
    given: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.bool_]]:
    """Solve tiles of importance (p, q, r, c) one at a time, by augmenting paths.

    Returns optimal masks (p, q, r, c), column potentials (p, q, c) of an optimal dual solution, rounded to float64,
    and whether the masks `given` (p, q, r, c), if they have at most `kept` ones in a line, are optimal (p, q).
    `start` (p, q, c) are potentials to start from, as those masks are.
    """
    shape = importance.shape
    if given is None:
        # Of equal entries a row keeps those it has; this spreads the ties of a constant tile evenly.
        spread = (np.arange(shape[3]) - np.arange(shape[2])[:, np.newaxis]) % shape[3] < margins.kept
        masks = np.broadcast_to(spread, shape).copy()
    else:
        masks = given.copy()
    potentials = np.zeros((*shape[:2], shape[3])) if start is None else start.astype(np.float64)
    optimal = np.zeros(shape[:2], np.bool_)
    sums = margins.kept, margins.exact_rows, margins.exact_columns
    for piece in pieces_of(shape, _WEIGHTS_ONE_BY_ONE):
        to_judge = masks[piece] if given is None else given[piece]
        part = importance[piece], *sums, to_judge, masks[piece], potentials[piece], optimal[piece]
        memory = new_memory(*shape[2:])
        while not solve_tiles(*part, memory):
            pass
    return masks, potentials, optimal


def _approach(importance: NDArray[np.float64], margins: Margins) -> NDArray[np.float64]:
    """Return column potentials (p, q, c) to start from: those of a few rounds of equilibration."""
    u, v = np.zeros(importance.shape[:3]), np.zeros((*importance.shape[:2], importance.shape[3]))
    for _ in range(_ROUNDS):
        _move(importance, v, u, margins.kept, margins.exact_rows)
        _move(importance.swapaxes(2, 3), u, v, margins.kept, margins.exact_columns)
    return v


def _move(
    c: NDArray[np.float64], across: NDArray[np.float64], along: NDArray[np.float64], kept: int, exact: bool
) -> None:
    """Move the potentials along to the middle between the kept-th and the following reduced entry, and beyond."""
    following = c.shape[3] - kept - 1
    if not 0 <= following < c.shape[3] - 1:
        return
    reduced = np.partition(c - across[:, :, np.newaxis], (following, following + 1))
    middle = 0.5 * (reduced[..., following] + reduced[..., following + 1])
    along += _RELAXATION * (middle - along)
    if not exact:
        np.maximum(along, 0, out=along)
