"""Kernels of `certify`: importance kept, and when column potentials prove a mask optimal (docs/proof.md)."""

import math

import numpy as np

from masksolve._jit import kernel

_LARGEST = np.finfo(np.float64).max


@kernel
def prove_tiles(weights, masks, potentials, n, exact_rows, exact_columns):
    """Return what masks (p, q, r, c) keep, and whether the column potentials (p, q, c) prove them valid and optimal.

    A mask is optimal if no kept entry of a row has a smaller abs(weight) - v than one that is not kept, or than zero
    where the row may stay short of n; if a row that is short leaves nothing above zero; and if, where columns may stay
    short, no v is negative and columns with a positive one are full: (1) and (2) of docs/proof.md.

    Returns all importance, kept importance and whether it is proven, each (p, q).
    """
    down, across, rows, cols = weights.shape
    total = np.empty((down, across))
    kept = np.empty((down, across))
    proven = np.empty((down, across), np.bool_)
    sums = np.empty(cols, np.int64)
    v = np.empty(cols)
    least = -_LARGEST if exact_rows else 0.0
    for p in range(down):
        for q in range(across):
            w, mask = weights[p, q], masks[p, q]
            all_weight, kept_weight, is_proven = 0.0, 0.0, True
            for j in range(cols):
                v[j] = potentials[p, q, j]
                sums[j] = 0
                # NaN compares false both ways, so it would slip through as proven.
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
                if count == n:
                    # Rounding is monotone: a strict order of rounded differences is one of the differences themselves.
                    # Equal ones prove it only where none was rounded.
                    is_ordered = lowest > highest or (lowest == highest and _is_exact(w[i], v))
                else:
                    # A difference of floats has the sign of what it is rounded from.
                    is_ordered = not exact_rows and count < n and highest <= 0.0
                if not (is_ordered and lowest >= least):
                    is_proven = False
            for j in range(cols):
                may_be_short = not exact_columns and v[j] == 0.0
                if sums[j] > n or (sums[j] < n and not may_be_short) or (not exact_columns and v[j] < 0.0):
                    is_proven = False
            total[p, q], kept[p, q], proven[p, q] = all_weight, kept_weight, is_proven
    return total, kept, proven


@kernel
def _is_exact(row, v):
    """Return whether no difference abs(row) - v is rounded: the error of each (Knuth's two-sum) is 0."""
    for j in range(len(row)):
        c = abs(np.float64(row[j]))
        difference = c - v[j]
        back = c - difference
        if (c - (difference + back)) + (back - v[j]) != 0.0:
            return False
    return True


@kernel
def add_up(importance, masks, best):
    """Return all importance of tiles (p, q, r, c), and what the masks and the best masks keep of it, each (p, q)."""
    down, across, rows, cols = importance.shape
    total = np.zeros((down, across))
    kept = np.zeros((down, across))
    best_kept = np.zeros((down, across))
    for p in range(down):
        for q in range(across):
            for i in range(rows):
                for j in range(cols):
                    c = importance[p, q, i, j]
                    total[p, q] += c
                    kept[p, q] += c if masks[p, q, i, j] else 0.0
                    best_kept[p, q] += c if best[p, q, i, j] else 0.0
    return total, kept, best_kept
