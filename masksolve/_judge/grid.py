"""Judges the masks of a grid of tiles, piece by piece: by potentials, and in integers what these do not decide."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._errors import UnusableWeightError
from masksolve._inputs import potentials_dtype
from masksolve._judge.inner_loops import program
from masksolve._judge.interface import LARGEST_TILE, OUTPUTS
from masksolve._judge.kernels import judge_lines, judge_tiles, line_buffers
from masksolve._methods import exact
from masksolve._threads import Buffers, Piece, importance_of, pieces_of, run_pieces
from masksolve._tiles import Margins

# Weights that are judged at once: where potentials are known; that are solved first, and stay in the cache in between;
# those of a converted copy; and of tiles that are solved one at a time.
_WEIGHTS_JUDGED = 1 << 20
_WEIGHTS_IN_PLACE = 1 << 17
_WEIGHTS_CONVERTED = 1 << 16
_WEIGHTS_ONE_BY_ONE = 1 << 13


class Verdicts(NamedTuple):
    """Arrays (P, Q) to be filled: all importance, what is kept, what an optimal mask keeps, whether this one is."""

    importance: NDArray[np.float64]
    kept: NDArray[np.float64]
    upper_bound: NDArray[np.float64]
    optimal: NDArray[np.bool_]


def _place(array: NDArray[Any] | None, axes: int) -> tuple[int, ...]:
    """Return the address of an array and the bytes along its first axes; zeros for none."""
    return (0,) * (1 + axes) if array is None else (array.__array_interface__["data"][0], *array.strides[:axes])


_NO_TILES: NDArray[np.int64] = np.empty(0, np.int64)


def judge_grid(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    shift: int,
    threads: int | None,
    potentials: NDArray[np.floating[Any]] | None,
    verdicts: Verdicts,
) -> None:
    """Judge the masks of tiles, both (P, Q, r, c); sums are times 2**-shift.

    `potentials` (P, Q, c): column potentials from the solve, if known; others are found here.

    Raises
    ------
    UnusableWeightError
        If a weight is not finite, or a mask keeps more than n in a line.
    """
    dtype = potentials_dtype(tiles.dtype)
    is_native = tiles.dtype == dtype and tiles.dtype.isnative and tiles.flags.aligned
    in_place = is_native and tiles.strides[3] == dtype.itemsize
    is_line = 1 in tiles.shape[2:]
    buffers = Buffers()

    def work(piece: Piece) -> None:
        part = tiles[piece] if in_place or (is_native and is_line) else exact.converted(tiles[piece], dtype, buffers)
        part_masks = masks[piece]
        importance, kept, upper_bound, optimal = verdicts
        part_verdicts = Verdicts(importance[piece], kept[piece], upper_bound[piece], optimal[piece])
        if is_line:
            _judge_lines(part, part_masks, margins, shift, part_verdicts)
        else:
            if part_masks.strides[3] != 1:
                part_masks = np.ascontiguousarray(part_masks)
            known = None if potentials is None else np.ascontiguousarray(potentials[piece], dtype)
            _judge_tiles(part, part_masks, margins, shift, known, part_verdicts, buffers)

    at_once = _WEIGHTS_CONVERTED
    if in_place:
        at_once = _WEIGHTS_IN_PLACE if potentials is None else _WEIGHTS_JUDGED
    if max(tiles.shape[2:]) > LARGEST_TILE and not is_line:
        at_once = _WEIGHTS_ONE_BY_ONE
    run_pieces(work, pieces_of(tiles.shape, at_once), threads)


def _judge_lines(
    tiles: NDArray[Any], masks: NDArray[np.bool_], margins: Margins, shift: int, verdicts: Verdicts
) -> None:
    is_row = tiles.shape[2] == 1
    must_be_full = margins.exact_rows if is_row else margins.exact_columns

    def judged(masks: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        lines, chosen = (tiles[:, :, 0], masks[:, :, 0]) if is_row else (tiles[..., 0], masks[..., 0])
        # Vectors run along the second axis.
        turned = lines.shape[1] < lines.shape[0]
        if turned:
            lines, chosen = lines.swapaxes(0, 1), chosen.swapaxes(0, 1)
        sums, optimal = np.empty((2, *lines.shape[:2])), np.empty(lines.shape[:2], np.bool_)
        buffers = tuple(line_buffers(lines.shape[2], lines.dtype))
        if not judge_lines(lines, chosen, margins.kept, must_be_full, shift, sums, optimal, buffers):
            raise UnusableWeightError
        return (sums.swapaxes(1, 2), optimal.T) if turned else (sums, optimal)

    sums, verdicts.optimal[...] = judged(masks)
    verdicts.importance[...], verdicts.kept[...] = sums
    verdicts.upper_bound[...] = verdicts.kept
    if not verdicts.optimal.all():
        best = np.empty(tiles.shape, np.bool_)
        _solve(tiles, best, margins, None)
        sums, _ = judged(best)
        np.copyto(verdicts.upper_bound, sums[1], where=~verdicts.optimal)


def _judge_tiles(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    shift: int,
    known: NDArray[np.floating[Any]] | None,
    verdicts: Verdicts,
    buffers: Buffers,
) -> None:
    down, across, rows, columns = tiles.shape
    count = down * across
    best, potentials = None, known
    if potentials is None:
        best = buffers.array("best", tiles.shape, np.dtype(np.bool_))
        potentials = buffers.array("potentials", (down, across, columns), tiles.dtype)
        _solve(tiles, best, margins, potentials)
    everything = np.arange(count) if shift != 0 or max(rows, columns) > LARGEST_TILE else _NO_TILES
    undecided = everything
    if max(rows, columns) <= LARGEST_TILE:
        undecided = buffers.array("undecided", (count,), np.dtype(np.int64))
        places = [_place(array, axes) for array, axes in ((tiles, 3), (masks, 3), (best, 3), (potentials, 2))]
        places += [_place(array, 2) for array in verdicts]
        remaining = judge_tiles(
            tuple(program(rows, columns, tiles.itemsize)),
            tuple(itertools.chain(*places)),
            (down, across, rows),
            margins.kept,
            margins.exact_rows,
            margins.exact_columns,
            undecided,
            np.empty(OUTPUTS),
        )
        if remaining < 0:
            raise UnusableWeightError
        # Sums of weights near the end of float64 are to be scaled first.
        undecided = undecided[:remaining] if shift == 0 else everything
    if len(undecided) > 0:
        _judge_by_paths(tiles, masks, margins, shift, potentials, divmod(undecided, across), verdicts)


def _judge_by_paths(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    shift: int,
    potentials: NDArray[np.floating[Any]],
    where: tuple[NDArray[np.int64], NDArray[np.int64]],
    verdicts: Verdicts,
) -> None:
    """Judge some tiles in integers, in which every comparison is exact."""
    importance, judged = importance_of(tiles[where])[np.newaxis], masks[where][np.newaxis]
    best, _, optimal = exact.solve_importance(importance, margins, potentials[where][np.newaxis], judged)
    scaled = np.ldexp(importance, -shift)
    of_all, of_judged, of_best = (np.where(kept, scaled, 0).sum((2, 3)) for kept in (True, judged, best))
    # Sums of nearly equal masks are rounded each in its own way; none that is allowed keeps more than the best.
    of_best = np.where(_fills(judged, margins), np.maximum(of_judged, of_best), of_best)
    # The same sum, added up in another order, may differ in its last bits.
    found = of_all, of_judged, np.where(optimal, of_judged, of_best), optimal
    for array, values in zip(verdicts, found, strict=True):
        array[where] = values[0]


def _solve(
    tiles: NDArray[Any], best: NDArray[np.bool_], margins: Margins, potentials: NDArray[np.floating[Any]] | None
) -> None:
    """Fill `best` with optimal masks, and column potentials, if asked for."""
    if 0 < margins.kept < max(tiles.shape[2:]):
        exact.solve(tiles, best, margins, threads=1, potentials=potentials)
    else:
        # Nothing may be kept, or all: potentials of zero say so.
        best[...] = margins.kept > 0


def _fills(masks: NDArray[np.bool_], margins: Margins) -> NDArray[np.bool_]:
    """Return whether masks (..., r, c), with at most `kept` ones per line, hold exactly that many where they must."""
    rows, columns = masks.sum(axis=-1), masks.sum(axis=-2)
    full_rows = not margins.exact_rows or (rows == margins.kept).all(axis=-1)
    full_columns = not margins.exact_columns or (columns == margins.kept).all(axis=-1)
    return np.broadcast_to(np.logical_and(full_rows, full_columns), masks.shape[:-2])
