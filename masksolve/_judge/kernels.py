"""Kernels of `certify`: the verdict on every tile of a grid, by potentials that a solver has found (docs/proof.md)."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._judge.inner_loops import differ, prove, weigh
from masksolve._judge.interface import (
    CLEARANCE,
    EXACT_COLUMNS,
    EXACT_ROWS,
    FARTHEST,
    FILLED,
    HAS_ZEROS,
    KEPT,
    LARGEST,
    NOT_FINITE,
    NOT_NEGATIVE,
    OVERFULL,
    PROVEN,
    TOTAL,
    UNROUNDED,
    WITHOUT_ZEROS,
    WRONG,
    unpack,
    write,
)
from masksolve._translated import inner, translated, translated_with_vectors

# Far above what is rounded in a sum of float64 over a tile, as a share of the sum.
_ROUNDING_OF_SUMS = 2.0**-37
# Far above what is rounded in all reduced costs of a tile together, as a share of its largest weight; and the range of
# that in which nothing overflows or gets subnormal.
_ROUNDING = 2.0**-31
_SMALLEST_TOP, _LARGEST_TOP = 2.0**-900, 2.0**1000
# Lines that lie side by side in a buffer, entry by entry.
_LINES = 128
_BUFFERED = 1 << 12


class Places(NamedTuple):
    """The memory of a grid of tiles: addresses, and bytes to the next tile row, tile column, row of a tile.

    `best` are masks that are claimed to be optimal, 0 if there are none. The last four are to be filled: all
    importance, what is kept, what an optimal mask keeps, and the verdict.
    """

    weights: int
    weights_down: int
    weights_across: int
    weights_row: int
    masks: int
    masks_down: int
    masks_across: int
    masks_row: int
    best: int
    best_down: int
    best_across: int
    best_row: int
    potentials: int
    potentials_down: int
    potentials_across: int
    importance: int
    importance_down: int
    importance_across: int
    kept: int
    kept_down: int
    kept_across: int
    upper_bound: int
    upper_bound_down: int
    upper_bound_across: int
    optimal: int
    optimal_down: int
    optimal_across: int


@translated
def judge_tiles(program, places, shape, n, exact_rows, exact_columns, undecided, out) -> int:
    """Judge the masks of a grid of tiles; return how many are left undecided, or -1 for what cannot be judged.

    Parameters
    ----------
    program
        `inner_loops.program`.
    places
        What `Places` holds.
    shape
        Tile rows, tile columns, and the rows of a tile.
    undecided
        (tiles): filled with the numbers of tiles that potentials do not decide.
    out
        (OUTPUTS) float64, is overwritten.

    A mask keeps more than n in a line, or a weight is not finite, where -1 is returned.
    """
    at = Places(*places)
    down, across, rows = shape
    reading = n | (EXACT_ROWS if exact_rows else 0) | (EXACT_COLUMNS if exact_columns else 0)
    out_address = out.ctypes.data
    count = 0
    for p in range(down):
        for q in range(across):
            weights = at.weights + p * at.weights_down + q * at.weights_across
            mask = at.masks + p * at.masks_down + q * at.masks_across
            v = at.potentials + p * at.potentials_down + q * at.potentials_across
            bound_place = at.upper_bound + p * at.upper_bound_down + q * at.upper_bound_across
            verdict = at.optimal + p * at.optimal_down + q * at.optimal_across
            flags = prove(program, weights, at.weights_row, mask, at.masks_row, v, rows, reading, out_address)
            if flags & (OVERFULL | NOT_FINITE) != 0:
                return -1
            kept = out[KEPT]
            write(at.importance + p * at.importance_down + q * at.importance_across, out[TOTAL])
            write(at.kept + p * at.kept_down + q * at.kept_across, kept)
            write(bound_place, kept)
            write(verdict, flags & PROVEN != 0)
            if flags & PROVEN != 0:
                continue
            if at.best != 0:
                best = at.best + p * at.best_down + q * at.best_across
                if differ(program, best, at.best_row, mask, at.masks_row, rows) != 0:
                    of_best = prove(program, weights, at.weights_row, best, at.best_row, v, rows, reading, out_address)
                    bound = out[KEPT]
                    # Whatever proves the better mask, that it keeps more refutes the other.
                    is_worse = flags & FILLED == 0 or bound - kept > _ROUNDING_OF_SUMS * bound
                    if is_worse and (
                        of_best & PROVEN != 0
                        or _prove_ties(
                            program, weights, at.weights_row, best, at.best_row, v, rows, reading, of_best, out
                        )
                    ):
                        write(bound_place, bound)
                        continue
            if flags & FILLED != 0 and _prove_ties(
                program, weights, at.weights_row, mask, at.masks_row, v, rows, reading, flags, out
            ):
                write(verdict, True)
                continue
            undecided[count] = p * across + q
            count += 1
    return count


@inner
def _prove_ties(program, weights, weights_row, mask, mask_row, v, rows, reading, flags, out):
    """Return whether potentials prove a mask that holds what lines must, though others may be as good.

    Without its zeros, a mask keeps as much; so it is optimal if it is without them, as "at most n".
    """
    out_address, n = out.ctypes.data, reading & 0xFFFF
    for attempt in range(2 if flags & HAS_ZEROS != 0 else 1):
        how = reading if attempt == 0 else n | WITHOUT_ZEROS
        if attempt == 1:
            found = prove(program, weights, weights_row, mask, mask_row, v, rows, how, out_address)
            if found & PROVEN != 0:
                return True
        if 0 < n < unpack(program).columns:
            found = weigh(program, weights, weights_row, mask, mask_row, v, rows, how, out_address)
            if found & NOT_NEGATIVE != 0 and _is_right(out, found & UNROUNDED != 0):
                return True
    return False


@inner
def _is_right(out, is_unrounded):
    """Return whether what `weigh` found proves a mask to be optimal ("Ties" in docs/proof.md)."""
    top, wrong = out[LARGEST], out[WRONG]
    # _ROUNDING holds for potentials up to this, and NaN is not.
    if not (out[FARTHEST] <= 8 * top and top < _LARGEST_TOP):
        return False
    if wrong == 0 and is_unrounded:
        return True
    rounding = top * _ROUNDING
    return top > _SMALLEST_TOP and wrong + rounding < out[CLEARANCE]


class LineBuffers(NamedTuple):
    """The memory of `judge_lines`: arrays of a few lines, side by side, and the bounds of their magnitudes."""

    own: NDArray[Any]
    lowest: NDArray[Any]
    highest: NDArray[Any]
    total: NDArray[np.float64]
    kept: NDArray[np.float64]
    ones: NDArray[np.int32]
    keep: NDArray[np.bool_]
    ends: NDArray[Any]


def line_buffers(length: int, dtype: np.dtype[Any]) -> LineBuffers:
    """Return buffers for lines of this length."""
    width = max(16, min(_LINES, _BUFFERED // length))
    # Of the dtype of the weights, or all would be computed in float64.
    own, lowest, highest = np.zeros((3, width), dtype)
    total, kept = np.zeros((2, width))
    ones, keep = np.zeros(width, np.int32), np.zeros(width, np.bool_)
    return LineBuffers(own, lowest, highest, total, kept, ones, keep, np.array([np.inf, -1], dtype))


@translated_with_vectors
def judge_lines(lines, masks, n, exact, shift, importance, importance_kept, optimal, buffers) -> bool:
    """Judge the masks of lines (p, q, k), each by itself: it keeps the n largest, or all that is not zero.

    `exact` is whether a line holds n; `importance`, `importance_kept` and `optimal` (p, q) are filled with all
    importance, what is kept, and the verdicts; `buffers` is what `LineBuffers` holds. Sums are times 2**-shift. Return
    whether they can be judged: no mask keeps more than n, and all weights are finite.
    """
    down, across, length = lines.shape
    own, lowest, highest, total, kept, ones, keep, ends = buffers
    width, above, below, scale = len(own), ends[0], ends[1], np.ldexp(1.0, -shift)
    bad = 0
    for p in range(down):
        for first in range(0, across, width):
            count = min(width, across - first)
            lowest[:], highest[:], ones[:], total[:], kept[:] = above, below, 0, 0, 0
            for i in range(length):
                for lane in range(count):
                    own[lane] = abs(lines[p, first + lane, i])
                    keep[lane] = masks[p, first + lane, i]
                    # NaN compares false.
                    bad += not own[lane] < np.inf
                for lane in range(width):
                    c, is_kept = own[lane], keep[lane]
                    lowest[lane] = min(lowest[lane], c if is_kept else above)
                    highest[lane] = max(highest[lane], below if is_kept else c)
                    ones[lane] += is_kept
                    scaled = c * scale
                    total[lane] += scaled
                    kept[lane] += scaled if is_kept else 0.0
            for lane in range(count):
                bad += ones[lane] > n
                is_best = lowest[lane] >= highest[lane] if ones[lane] == n else not exact and highest[lane] <= 0
                importance[p, first + lane], importance_kept[p, first + lane] = total[lane], kept[lane]
                optimal[p, first + lane] = is_best
    return bad == 0
