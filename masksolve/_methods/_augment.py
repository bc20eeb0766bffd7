"""The exact solver of one tile: successive shortest augmenting paths over columns, in integers.

The tile is a transportation problem (DESIGN: "Repair"). Given column potentials v, every row takes the entries with
the largest c - v; then one surplus unit after another moves from an overfull to an underfull column along a
shortest path, on which a row drops one column and takes the next. Only columns are nodes. Integers make every
comparison exact, so that ties need no care.

`Node` cols, the last one, is "capacity left unused": rows may leave capacity there where they hold *at most*
`kept`, and columns may take from it where they hold at most `kept`. Its entries cost nothing.
"""

import numpy as np

from masksolve._jit import kernel


@kernel
def solve_tile(c, kept, exact_rows, exact_columns, v, mask):
    """Fill mask (rows, cols) with an optimal mask of the importance c and v (cols + 1) with potentials that prove it.

    c and v are int64, or Python ints in object arrays when run as `interpreted(solve_tile)`. v is a starting point on
    entry; any will do, a good one saves work. On return, v[cols] == 0 and, for every feasible y, sum(c * y) <= sum
    over rows of its best choice of (c - v) + kept * sum(v) == sum(c * mask).
    """
    rows, cols = c.shape
    unused = cols
    load = np.zeros(cols, np.int64)
    row_unused = np.zeros(rows, np.int64)
    column_unused = np.zeros(cols, np.int64)
    v[:] = v - v[unused]
    if not exact_columns:
        for j in range(cols):
            if v[j] < 0:
                v[j] = 0

    for i in range(rows):
        row_unused[i] = kept - _take_best(c, i, kept, exact_rows, v, mask)
        for j in range(cols):
            if mask[i, j]:
                load[j] += 1
    if not exact_columns:
        for j in range(cols):
            if v[j] == 0 and load[j] < kept:
                column_unused[j] = kept - load[j]
                load[j] = kept

    for from_unused in range(2):
        while _move_one(c, kept, exact_rows, exact_columns, v, mask, load, row_unused, column_unused, from_unused == 1):
            pass
    v[:] = v - v[unused]


@kernel
def _take_best(c, i, kept, exact_rows, v, mask):
    """Mark the best choice of row i and return how many entries it takes.

    Among equals the entries from column i on are taken first, which spreads the ties of a constant tile over all
    columns.
    """
    cols = c.shape[1]
    mask[i, :] = False
    taken = 0
    while taken < min(kept, cols):
        best = -1
        for step in range(cols):
            j = (i + step) % cols
            if not mask[i, j] and (best < 0 or c[i, j] - v[j] > c[i, best] - v[best]):
                best = j
        if not exact_rows and c[i, best] - v[best] <= 0:
            break
        mask[i, best] = True
        taken += 1
    return taken


@kernel
def _move_one(c, kept, exact_rows, exact_columns, v, mask, load, row_unused, column_unused, from_unused):
    """Move one unit from an overfull column, or from the unused capacity, to an underfull one; False if none is."""
    rows, cols = c.shape
    unused = cols
    has_unused = not (exact_rows and exact_columns)
    nodes = cols + 1 if has_unused else cols

    distance = np.zeros_like(v)
    seen = np.zeros(cols + 1, np.bool_)
    done = np.zeros(cols + 1, np.bool_)
    from_node = np.full(cols + 1, -1, np.int64)
    through = np.full(cols + 1, -1, np.int64)

    any_source = False
    any_sink = has_unused and not from_unused
    for j in range(cols):
        if load[j] > kept and not from_unused:
            seen[j] = True
            any_source = True
        if load[j] < kept:
            any_sink = True
    if from_unused and has_unused:
        seen[unused] = True
        any_source = True
    if not (any_source and any_sink):
        return False

    while True:
        j = -1
        for k in range(nodes):
            if seen[k] and not done[k] and (j < 0 or distance[k] < distance[j]):
                j = k
        done[j] = True
        if j == unused:
            if not from_unused:
                break
            base = distance[j] - v[unused]
            for i in range(rows):
                if row_unused[i] > 0:
                    _relax_row(c, i, j, base, v, mask, distance, seen, done, from_node, through)
            if not exact_columns:
                for k in range(cols):
                    _relax(k, base + v[k], rows, j, distance, seen, done, from_node, through)
            continue
        if load[j] < kept:
            break
        for i in range(rows):
            if mask[i, j]:
                base = distance[j] + (c[i, j] - v[j])
                _relax_row(c, i, j, base, v, mask, distance, seen, done, from_node, through)
                if not exact_rows:
                    _relax(unused, base + v[unused], i, j, distance, seen, done, from_node, through)
        if column_unused[j] > 0:
            _relax(unused, distance[j] - v[j] + v[unused], rows, j, distance, seen, done, from_node, through)

    end = j
    for k in range(nodes):
        v[k] -= distance[k] if done[k] else distance[end]

    k = end
    while from_node[k] >= 0:
        j, i = from_node[k], through[k]
        if i == rows:
            if j != unused:
                column_unused[j] -= 1
            if k != unused:
                column_unused[k] += 1
        else:
            if j == unused:
                row_unused[i] -= 1
            else:
                mask[i, j] = False
            if k == unused:
                row_unused[i] += 1
            else:
                mask[i, k] = True
        k = j
    if k != unused:
        load[k] -= 1
    if end != unused:
        load[end] += 1
    return True


@kernel
def _relax_row(c, i, j, base, v, mask, distance, seen, done, from_node, through):
    """Offer every column that row i does not hold a path by way of column j."""
    for k in range(c.shape[1]):
        if not mask[i, k]:
            _relax(k, base - (c[i, k] - v[k]), i, j, distance, seen, done, from_node, through)


@kernel
def _relax(k, length, row, j, distance, seen, done, from_node, through):
    if not done[k] and (not seen[k] or length < distance[k]):
        distance[k] = length
        seen[k] = True
        from_node[k] = j
        through[k] = row
