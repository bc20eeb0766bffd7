"""Judges the masks of a grid of tiles, piece by piece: by potentials, and in integers what these do not decide."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._errors import UnusableWeightError
from masksolve._inputs import potentials_dtype
from masksolve._judge import lines
from masksolve._judge.inner_loops import program
from masksolve._judge.interface import LARGEST_TILE, OUTPUTS
from masksolve._judge.kernels import judge_tiles
from masksolve._machine_code import address_of
from masksolve._methods import exact
from masksolve._threads import Buffers, Piece, importance_of, pieces_of, run_pieces
from masksolve._tiles import Margins

# Weights that are judged at once: where potentials are known; of single lines; that are solved first, and stay in the
# cache in between; those of a converted copy; and of tiles that are solved one at a time.
_WEIGHTS_JUDGED = 1 << 20
_WEIGHTS_IN_LINES = 1 << 18
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
    return (0,) * (1 + axes) if array is None else (address_of(array), *array.strides[:axes])


# Those of a thread, kept for its next call: fresh memory takes as long as judging lines.
_buffers = Buffers()
_NO_TILES: NDArray[np.int64] = np.empty(0, np.int64)


class Sums(NamedTuple):
    """The verdicts on some tiles together: what is kept, what optimal masks keep, whether these all are."""

    kept: float
    upper_bound: float
    optimal: bool


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

    def into(piece: Piece) -> Verdicts:
        importance, kept, upper_bound, optimal = verdicts
        return Verdicts(importance[piece], kept[piece], upper_bound[piece], optimal[piece])

    def bound(found: Verdicts) -> None:
        if found.optimal.all():
            found.upper_bound[...] = found.kept

    _judge_pieces(tiles, masks, margins, shift, threads, potentials, into, bound)


def sum_up(tiles: NDArray[Any], masks: NDArray[np.bool_], margins: Margins, shift: int) -> list[Sums]:
    """Judge the masks of tiles as `judge_grid` does; return the sums of parts of the grid, in any order."""
    sums = []

    # Verdicts on all single lines would take more memory than their weights.
    def into(piece: Piece) -> Verdicts:
        shape = tiles[piece].shape[:2]
        float64 = np.dtype(np.float64)
        importance, kept, upper_bound = (_buffers.array(name, shape, float64) for name in Verdicts._fields[:3])
        return Verdicts(importance, kept, upper_bound, _buffers.array("optimal", shape, np.dtype(np.bool_)))

    def add(found: Verdicts) -> None:
        kept, optimal = float(found.kept.sum()), bool(found.optimal.all())
        sums.append(Sums(kept, kept if optimal else float(found.upper_bound.sum()), optimal))

    _judge_pieces(tiles, masks, margins, shift, None, None, into, add)
    return sums


def _judge_pieces(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    shift: int,
    threads: int | None,
    potentials: NDArray[np.floating[Any]] | None,
    into: Callable[[Piece], Verdicts],
    done: Callable[[Verdicts], None],
) -> None:
    """Judge the masks of tiles, piece by piece: fill into(piece), and call done(that).

    Where all masks of a piece are optimal, so that what they keep is the upper bound, that may be left unfilled.
    """
    dtype = potentials_dtype(tiles.dtype)
    is_native = tiles.dtype == dtype and tiles.dtype.isnative and tiles.flags.aligned
    in_place = is_native and tiles.strides[3] == dtype.itemsize
    is_line = 1 in tiles.shape[2:]

    def work(piece: Piece) -> None:
        part = tiles[piece] if in_place or (is_native and is_line) else exact.converted(tiles[piece], dtype, _buffers)
        part_masks, verdicts = masks[piece], into(piece)
        if is_line:
            _judge_lines(part, part_masks, margins, shift, verdicts)
        else:
            if part_masks.strides[3] != 1:
                part_masks = np.ascontiguousarray(part_masks)
            known = None if potentials is None else np.ascontiguousarray(potentials[piece], dtype)
            _judge_tiles(part, part_masks, margins, shift, known, verdicts)
        done(verdicts)

    at_once = _WEIGHTS_CONVERTED
    if is_line:
        at_once = _WEIGHTS_IN_LINES if is_native else _WEIGHTS_CONVERTED
    elif in_place:
        at_once = _WEIGHTS_IN_PLACE if potentials is None else _WEIGHTS_JUDGED
    if max(tiles.shape[2:]) > LARGEST_TILE and not is_line:
        at_once = _WEIGHTS_ONE_BY_ONE
    run_pieces(work, pieces_of(tiles.shape, at_once), threads)


def _judge_lines(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    shift: int,
    verdicts: Verdicts,
) -> None:
    is_row = tiles.shape[2] == 1

    def judge(masks: NDArray[np.bool_], importance: NDArray[Any], kept: NDArray[Any], optimal: NDArray[Any]) -> None:
        own, chosen = (array[:, :, 0] if is_row else array[..., 0] for array in (tiles, masks))
        must_be_full = margins.exact_rows if is_row else margins.exact_columns
        if not lines.judge(own, chosen, margins.kept, must_be_full, shift, (importance, kept), optimal):
            raise UnusableWeightError

    judge(masks, verdicts.importance, verdicts.kept, verdicts.optimal)
    if verdicts.optimal.all():
        return
    # They lie as weights do, or both would be copied.
    down, across, rows, columns = tiles.shape
    best = _buffers.array("best", (down, rows, across, columns), np.dtype(np.bool_)).swapaxes(1, 2)
    _solve(tiles, best, margins, None)
    of_best, is_best = np.empty(verdicts.kept.shape), np.empty(verdicts.kept.shape, np.bool_)
    judge(best, verdicts.importance, of_best, is_best)
    verdicts.upper_bound[...] = np.where(verdicts.optimal, verdicts.kept, of_best)


def _judge_tiles(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    margins: Margins,
    shift: int,
    known: NDArray[np.floating[Any]] | None,
    verdicts: Verdicts,
) -> None:
    down, across, rows, columns = tiles.shape
    count = down * across
    best, potentials = None, known
    if potentials is None:
        best = _buffers.array("best", tiles.shape, np.dtype(np.bool_))
        potentials = _buffers.array("potentials", (down, across, columns), tiles.dtype)
        _solve(tiles, best, margins, potentials)
    everything = np.arange(count) if shift != 0 or max(rows, columns) > LARGEST_TILE else _NO_TILES
    undecided = everything
    if max(rows, columns) <= LARGEST_TILE:
        undecided = _buffers.array("undecided", (count,), np.dtype(np.int64))
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
