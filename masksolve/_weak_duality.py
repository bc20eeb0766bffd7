"""Kernels of `certify`: importance kept, and the upper bound that potentials give by weak duality."""

import numpy as np

from masksolve._jit import kernel

NOT_OPTIMAL, OPTIMAL, CLOSE_CALL = 0, 1, 2

# Far above the rounding of a float64 sum over a tile.
_RELATIVE_ROUNDING = 1e-9


@kernel
def judge_tiles(importance, masks, best, potentials, n, exact_rows, exact_columns):
    """Judge masks (p, q, r, c) against optimal ones, `best`, and their column potentials (p, q, c).

    Returns kept importance, upper bound and verdict, each (p, q). CLOSE_CALL: the mask differs from `best` by no
    more than rounding, so that only exact summation can tell.
    """
    down, across, _, cols = importance.shape
    kept = np.empty((down, across))
    bound = np.empty((down, across))
    verdict = np.empty((down, across), np.int8)
    v = np.empty(cols)
    for p in range(down):
        for q in range(across):
            c, mask = importance[p, q], masks[p, q]
            for j in range(cols):
                v[j] = potentials[p, q, j] if exact_columns else max(0.0, potentials[p, q, j])
            kept[p, q] = _kept(c, mask)
            best_kept = _kept(c, best[p, q])
            bound[p, q] = _upper_bound(c, v, n, exact_rows)
            rounding = _RELATIVE_ROUNDING * best_kept
            is_bounded = bound[p, q] <= best_kept + rounding
            if is_bounded:
                # What the potentials bound, to rounding, is the value of a mask: no bound is tighter.
                bound[p, q] = best_kept
            falls_short = kept[p, q] < best_kept - rounding
            if falls_short or not is_bounded or not _fills(mask, n, exact_rows, exact_columns):
                verdict[p, q] = NOT_OPTIMAL
            elif (mask == best[p, q]).all():
                verdict[p, q] = OPTIMAL
            else:
                verdict[p, q] = CLOSE_CALL
    return kept, bound, verdict


@kernel
def _kept(c, mask):
    total = 0.0
    for i in range(c.shape[0]):
        for j in range(c.shape[1]):
            if mask[i, j]:
                total += c[i, j]
    return total


@kernel
def _fills(mask, n, exact_rows, exact_columns):
    """Whether lines that must hold exactly n do; no line holds more."""
    rows, cols = mask.shape
    total = mask.sum()
    return not (exact_rows and total < n * rows) and not (exact_columns and total < n * cols)


@kernel
def _upper_bound(c, v, n, exact_rows):
    """Sum over rows of the best choice of c - v, plus n * sum(v): no feasible mask keeps more, whatever v is.

    Where columns hold at most n, v must not be negative.
    """
    rows, cols = c.shape
    total = n * v.sum()
    for i in range(rows):
        values = np.sort(c[i] - v)
        for j in range(cols - 1, max(-1, cols - 1 - n), -1):
            if exact_rows or values[j] > 0:
                total += values[j]
    return total
