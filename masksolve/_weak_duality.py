"""Kernels of `certify`: importance kept, the upper bound that potentials give, and when they prove a mask optimal."""

import math

import numpy as np

from masksolve._jit import kernel

NOT_OPTIMAL, OPTIMAL, CLOSE_CALL = 0, 1, 2

_LARGEST = np.finfo(np.float64).max

# Far above the rounding of a float64 sum over a tile.
_RELATIVE_ROUNDING = 1e-9


@kernel
def prove_tiles(weights, masks, potentials, n):
    """Which masks (p, q, r, c), n ones in every line, the column potentials (p, q, c) prove optimal.

    A mask is optimal if no kept entry of a row has a smaller abs(weight) - v than one that is not kept. Rounding is
    monotone, so a strict order of rounded differences proves it; equal ones prove it where none was rounded.

    Returns all importance, kept importance and whether it is proven, each (p, q).
    """
    down, across, rows, cols = weights.shape
    total = np.empty((down, across))
    kept = np.empty((down, across))
    proven = np.empty((down, across), np.bool_)
    sums = np.empty(cols, np.int64)
    v = np.empty(cols)
    for p in range(down):
        for q in range(across):
            w, mask = weights[p, q], masks[p, q]
            all_weight, kept_weight, is_proven = 0.0, 0.0, True
            for j in range(cols):
                v[j] = potentials[p, q, j]
                sums[j] = 0
                # Comparisons with NaN would be neither here nor there.
                is_proven &= math.isfinite(v[j])
            for i in range(rows):
                lowest, highest, count = _LARGEST, -_LARGEST, 0
                for j in range(cols):
                    # By arithmetic: a branch on what is as good as random costs more.
                    keep = np.float64(mask[i, j])
                    c = abs(np.float64(w[i, j]))
                    difference = c - v[j]
                    all_weight += c
                    kept_weight += c * keep
                    lowest = min(lowest, difference + (1.0 - keep) * _LARGEST)
                    highest = max(highest, difference - keep * _LARGEST)
                for j in range(cols):
                    count += mask[i, j]
                    sums[j] += mask[i, j]
                if count != n or not (lowest > highest or (lowest == highest and _is_exact(w[i], v))):
                    is_proven = False
            total[p, q], kept[p, q] = all_weight, kept_weight
            proven[p, q] = is_proven and (sums == n).all()
    return total, kept, proven


@kernel
def _is_exact(row, v):
    """Whether no difference abs(row) - v is rounded: the error of each (Knuth's two-sum) is 0."""
    for j in range(len(row)):
        c = abs(np.float64(row[j]))
        difference = c - v[j]
        back = c - difference
        if (c - (difference + back)) + (back - v[j]) != 0.0:
            return False
    return True


@kernel
def judge_tiles(importance, masks, best, potentials, proven, n, exact_rows, exact_columns):
    """Judge masks (p, q, r, c) against optimal ones, `best`, and their column potentials (p, q, c).

    Returns all importance, kept importance, upper bound and verdict, each (p, q). Where `best` is `proven` to be, its
    value is the bound. CLOSE_CALL: the mask differs from `best` by no more than rounding, so that only exact summation
    can tell.
    """
    down, across, _, cols = importance.shape
    total = np.empty((down, across))
    kept = np.empty((down, across))
    bound = np.empty((down, across))
    verdict = np.empty((down, across), np.int8)
    v = np.empty(cols)
    for p in range(down):
        for q in range(across):
            c, mask = importance[p, q], masks[p, q]
            total[p, q], kept[p, q], best_kept, is_best = _sums(c, mask, best[p, q])
            rounding = _RELATIVE_ROUNDING * best_kept
            if proven[p, q]:
                bound[p, q] = best_kept
            else:
                for j in range(cols):
                    v[j] = potentials[p, q, j] if exact_columns else max(0.0, potentials[p, q, j])
                bound[p, q] = _upper_bound(c, v, n, exact_rows)
            is_bounded = bound[p, q] <= best_kept + rounding
            if is_bounded:
                # What the potentials bound, to rounding, is the value of a mask: no bound is tighter.
                bound[p, q] = best_kept
            falls_short = kept[p, q] < best_kept - rounding
            if falls_short or not is_bounded or not _fills(mask, n, exact_rows, exact_columns):
                verdict[p, q] = NOT_OPTIMAL
            elif is_best:
                verdict[p, q] = OPTIMAL
            else:
                verdict[p, q] = CLOSE_CALL
    return total, kept, bound, verdict


@kernel
def _sums(c, mask, best):
    """All importance, what the mask keeps, what the best one keeps, and whether the two are the same."""
    total, kept, best_kept, is_best = 0.0, 0.0, 0.0, True
    for i in range(c.shape[0]):
        for j in range(c.shape[1]):
            total += c[i, j]
            kept += c[i, j] if mask[i, j] else 0.0
            best_kept += c[i, j] if best[i, j] else 0.0
            is_best &= mask[i, j] == best[i, j]
    return total, kept, best_kept, is_best


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
