"""Method "exact": an optimal mask of every tile, with potentials that prove it, whatever the weights.

Source: the min-cost flow of Hubara et al. 2021 (arXiv 2102.08124), of which this solves the dual.

Whole tiles up to 64x64 are equilibrated many at a time (`_equilibrate`), in float32 where that holds the weights
and in float64 otherwise. The few that are not certified there, ragged edges, and larger tiles are solved one at a
time by augmenting paths (`_augment`), in integers: weights times a power of two, below 2**55 or so. Where that is
exact, and it is for integers, float16, bfloat16 and all but the widest-ranging float32 tiles, integer arithmetic is
the proof. Otherwise the mask is proven optimal for the weights as given by a strict order of floating-point reduced
costs; and a tile where even that fails, because weights tie, is solved in Python's unbounded integers.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._jit import interpreted, kernel
from masksolve._methods import potentials_dtype
from masksolve._methods._augment import solve_tile
from masksolve._methods._chunks import (
    Piece,
    for_each_chunk,
    importance_of,
    pieces_of,
    refuse_large_integers,
    run_pieces,
)
from masksolve._methods._equilibrate import equilibrate
from masksolve._tiles import LineSums

_logger = logging.getLogger("masksolve")
_SMALLEST_NORMAL = float(np.finfo(np.float64).smallest_normal)

# Words of 64 bits hold a row of a mask.
_LARGEST_EQUILIBRATED = 64
# Weights that one call of a kernel takes: from where they lie, and from a converted copy.
_WEIGHTS_IN_PLACE = 1 << 18
_WEIGHTS_CONVERTED = 1 << 17


def solve(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    line_sums: LineSums,
    *,
    threads: int | None,
    potentials: NDArray[np.floating[Any]] | None = None,
    warm: bool = False,
) -> None:
    """Fill masks (P, Q, r, c) with optimal masks of tiles (P, Q, r, c).

    `potentials` (P, Q, c) is filled with column potentials; where `warm`, it holds
    those to start from.
    """
    rows, cols = tiles.shape[2:]
    if rows == 1 or cols == 1:

        def work(piece: Piece) -> None:
            importance = importance_of(tiles[piece])
            lines = importance.reshape(*importance.shape[:2], -1)
            masks[piece] = _best_of_lines(lines, line_sums.kept).reshape(importance.shape)

        for_each_chunk(work, tiles.shape, threads)
    elif rows != cols or not 0 < line_sums.kept < rows or rows > _LARGEST_EQUILIBRATED:

        def work(piece: Piece) -> None:
            importance = importance_of(tiles[piece])
            start = potentials[piece].astype(np.float64) if potentials is not None and warm else None
            masks[piece], found = solve_importance(importance, line_sums, start)
            if potentials is not None:
                potentials[piece] = found

        for_each_chunk(work, tiles.shape, threads)
    else:
        _equilibrate(tiles, masks, line_sums, threads, potentials, warm)


def _equilibrate(
    tiles: NDArray[Any],
    masks: NDArray[np.bool_],
    line_sums: LineSums,
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
            part = _converted(part, dtype)
        if part_potentials is None:
            _equilibrate_piece(part, part_masks, line_sums, None, warm)
        else:
            found = part_potentials.reshape(-1, part.shape[3])
            _equilibrate_piece(part, part_masks, line_sums, found, warm)
            part_potentials[...] = found.reshape(part_potentials.shape)

    at_once = _WEIGHTS_IN_PLACE if in_place else _WEIGHTS_CONVERTED
    if tiles.size <= at_once:
        work(tiles, masks, potentials)
    else:

        def work_on(piece: Piece) -> None:
            work(tiles[piece], masks[piece], None if potentials is None else potentials[piece])

        run_pieces(work_on, pieces_of(tiles.shape, at_once), threads)


def _converted(tiles: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tiles of any dtype and strides as an array of tile rows that lie one after the other."""
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
    tiles: NDArray[Any], masks: NDArray[np.bool_], line_sums: LineSums, potentials: NDArray[Any] | None, warm: bool
) -> None:
    left = equilibrate(tiles, masks, line_sums, potentials, warm)
    if left is None:
        return
    down, across = tiles.shape[:2]
    _logger.debug("%d of %d tiles left to augmenting paths", len(left.where), down * across)
    where = left.where >> 32, left.where & 0xFFFFFFFF
    solved, ends = solve_importance(importance_of(tiles[where])[np.newaxis], line_sums, left.potentials[np.newaxis])
    masks[where] = solved[0]
    if potentials is not None:
        with np.errstate(over="ignore"):  # beyond the end of float32; whoever returns them sees to that
            potentials[where[0] * across + where[1]] = ends[0]


def solve_importance(
    importance: NDArray[np.float64], line_sums: LineSums, start: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Optimal masks (p, q, r, c) of importance (p, q, r, c), and column potentials (p, q, c), by augmenting paths.

    The potentials, in units of the importance, are those of an optimal dual solution, rounded to float64. `start`
    (p, q, c) are potentials to start from.
    """
    masks = np.empty(importance.shape, np.bool_)
    potentials = np.zeros((*importance.shape[:2], importance.shape[3])) if start is None else start.copy()
    proven = np.empty(importance.shape[:2], np.bool_)
    _solve_tiles(importance, line_sums.kept, line_sums.exact_rows, line_sums.exact_columns, masks, potentials, proven)
    left = np.argwhere(~proven)
    if len(left):
        _logger.debug("%d of %d tiles tie beyond float64: solved in unbounded integers", len(left), proven.size)
    for p, q in left:
        masks[p, q], potentials[p, q] = _solve_unbounded(importance[p, q], potentials[p, q], line_sums)
    return masks, potentials


def _solve_unbounded(
    importance: NDArray[np.float64], start: NDArray[np.float64], line_sums: LineSums
) -> tuple[NDArray[np.bool_], list[float]]:
    """Solve one tile in Python ints, in which every float64 is exact, from potentials that are nearly right."""
    # Every float64 is an integer times 2**(exponent - 53).
    unit = min(math.frexp(w)[1] - 53 for w in importance.flat if w > 0)

    def in_units(value: float) -> int:
        if not math.isfinite(value):  # potentials of weights near the end of float64; any start will do
            return 0
        numerator, denominator = float(value).as_integer_ratio()
        shift = -unit - (denominator.bit_length() - 1)
        return numerator << shift if shift >= 0 else numerator >> -shift

    c = np.empty(importance.shape, object)
    c[...] = [[in_units(weight) for weight in row] for row in importance]
    v = np.array([*map(in_units, start), 0], object)
    mask = np.empty(importance.shape, np.bool_)
    interpreted(solve_tile)(c, line_sums.kept, line_sums.exact_rows, line_sums.exact_columns, v, mask)
    return mask, [_from_units(potential, unit) for potential in v[:-1]]


def _from_units(value: int, unit: int) -> float:
    """The float nearest to value * 2**unit."""
    try:
        return value / (1 << -unit) if unit < 0 else float(value << unit)
    except OverflowError:
        return math.copysign(math.inf, value)


@kernel
def _solve_tiles(importance, kept, exact_rows, exact_columns, masks, potentials, proven):
    down, across, rows, cols = importance.shape
    integers = np.empty((rows, cols), np.int64)
    scaled = np.empty((rows, cols))
    mask = np.empty((rows, cols), np.bool_)
    v = np.empty(cols + 1, np.int64)
    centred = np.empty(cols)
    # A path's reduced cost is below 8 (cols + 8) times the largest weight, and has to stay below 2**62.
    bits = 62 - math.ceil(math.log2(8 * (cols + 8)))
    for p in range(down):
        for q in range(across):
            exponent, exact, faithful = _scale(importance[p, q], bits, scaled, integers)
            v[cols] = 0
            for j in range(cols):
                scaled_start = math.ldexp(potentials[p, q, j], exponent)
                v[j] = np.int64(scaled_start) if abs(scaled_start) < 4.0 * 2.0**bits else 0
            solve_tile(integers, kept, exact_rows, exact_columns, v, mask)
            masks[p, q] = mask
            for j in range(cols):
                centred[j] = v[j]
            proven[p, q] = exact
            if not exact and faithful:
                _centre(scaled, kept, exact_rows, exact_columns, mask, centred)
                proven[p, q] = _is_strict(scaled, kept, exact_rows, exact_columns, mask, centred)
            for j in range(cols):
                potentials[p, q, j] = math.ldexp(centred[j], -exponent)


@kernel
def _best_of_lines(lines, kept):
    """The mask of the largest `kept` entries of every line (p, q, k); of equal ones the first."""
    masks = np.zeros(lines.shape, np.bool_)
    for p in range(lines.shape[0]):
        for q in range(lines.shape[1]):
            line, mask = lines[p, q], masks[p, q]
            for _ in range(min(kept, len(line))):
                best = -1
                for k in range(len(line)):
                    if not mask[k] and (best < 0 or line[k] > line[best]):
                        best = k
                mask[best] = True
    return masks


@kernel
def _scale(importance, bits, scaled, integers):
    """Fill scaled = importance * 2**exponent < 2**bits and integers = round(scaled).

    Returns the exponent, whether the integers are exact, and whether the scaled floats are.
    """
    largest = importance.max()
    if largest == 0:
        scaled[:] = 0
        integers[:] = 0
        return 0, True, True
    exponent = bits - math.frexp(largest)[1]
    # In two steps, since 2**exponent itself can be out of range.
    first = math.ldexp(1.0, exponent // 2)
    second = math.ldexp(1.0, exponent - exponent // 2)
    exact = True
    faithful = True
    for i in range(importance.shape[0]):
        for j in range(importance.shape[1]):
            value = importance[i, j] * first * second
            rounded = np.rint(value)
            exact &= rounded == value
            if value < _SMALLEST_NORMAL and importance[i, j] > 0:
                exact = faithful = False
            scaled[i, j] = value
            integers[i, j] = np.int64(rounded)
    return exponent, exact, faithful


@kernel
def _centre(c, kept, exact_rows, exact_columns, mask, v):
    """Move v to the middle of the ranges in which it proves the mask, alternating with row potentials.

    An augmenting path leaves reduced costs of exactly zero behind, which rounding can turn negative. Away from the
    ends of its range a potential proves strictly.
    """
    rows, cols = c.shape
    u = np.zeros(rows)
    for _ in range(rows + cols):
        for i in range(rows):
            low, high, count = -np.inf, np.inf, 0
            for j in range(cols):
                if mask[i, j]:
                    high = min(high, c[i, j] - v[j])
                    count += 1
                else:
                    low = max(low, c[i, j] - v[j])
            u[i] = _middle(low, high, exact_rows, count == kept)
        moved = False
        for j in range(cols):
            low, high, count = -np.inf, np.inf, 0
            for i in range(rows):
                if mask[i, j]:
                    high = min(high, c[i, j] - u[i])
                    count += 1
                else:
                    low = max(low, c[i, j] - u[i])
            middle = _middle(low, high, exact_columns, count == kept)
            moved |= middle != v[j]
            v[j] = middle
        if not moved or _is_strict(c, kept, exact_rows, exact_columns, mask, v):
            break


@kernel
def _middle(low, high, exact, full):
    """The middle of a line's range [low, high]; >= 0 where the line need not be full, and 0 where it is not."""
    if not exact:
        if not full:
            return 0.0
        low = max(low, 0.0)
        high = max(high, 0.0)
    if low == -np.inf:
        return high
    return low if high == np.inf else 0.5 * (low + high)


@kernel
def _is_strict(c, kept, exact_rows, exact_columns, mask, v):
    """Whether v proves the mask optimal for c in exact arithmetic, judged by rounded differences.

    Rounding is monotone: c - v > c' - v' after rounding implies the same before it (DESIGN, "Duality"). Comparisons
    of c with v need no rounding at all.
    """
    rows, cols = c.shape
    for i in range(rows):
        worst_kept, best_left, count = np.inf, -np.inf, 0
        for j in range(cols):
            if mask[i, j]:
                count += 1
                worst_kept = min(worst_kept, c[i, j] - v[j])
                if not exact_rows and c[i, j] < v[j]:
                    return False
            else:
                best_left = max(best_left, c[i, j] - v[j])
        if count == kept:
            if not worst_kept > best_left:
                return False
        elif best_left > 0:
            return False
    if not exact_columns:
        for j in range(cols):
            if v[j] < 0:
                return False
            if v[j] > 0:
                count = 0
                for i in range(rows):
                    count += mask[i, j]
                if count < kept:
                    return False
    return True
