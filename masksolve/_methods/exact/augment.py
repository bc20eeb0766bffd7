"""The exact solver of one tile: a minimum-cost flow, in 64-bit integers, whatever the weights.

A tile is a transportation problem: every row sends `kept` units to the columns, every column takes `kept`. Given
column potentials v, each row takes the entries with the largest c - v; then surplus units move from overfull to
underfull columns along paths of least reduced cost (primal-dual, Dinic's search among the paths of one length, so
that ties, which are many paths of one length, cost one search). Integers make every comparison exact.

One more column and one more row stand for "capacity left unused", where lines hold *at most* `kept`: a row may send
its units to the one, a column may be served by the other, at no importance.

Weights are solved from their leading bits down (scaling, as Gabow and Tarjan do), as many at a time as 64-bit sums
hold, or fewer, of which more tie: solve for the leading bits, append the next ones to the *reduced* costs, and mend the
flow. Entries with large reduced costs are decided for good, so that this never overflows; docs/proof.md, "One tile, in
integers", says why the result is optimal.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._translated import inner, translated_with_vectors

# A path costs less than 2**_BITS_OF_PATHS (`_solve` says why), and so does any entry that a path may use; the sum of
# both is less than this.
_UNREACHED = 1 << 59
_BITS_OF_PATHS = 58
# Bits to begin with, of tiles of so many columns at most: paths that differ in later bits alone tie so far, and one
# search finds many. Larger tiles, most of which were not equilibrated before and do not tie, take longer so.
_LEADING_BITS = 18
_LARGEST_OF_LEADING_BITS = 64
# The reduced cost of entries that no path may use any more, and of those that do not exist, with a sign. Between two
# calls of `_append_bits` potentials move by less than 2**_BITS_OF_PATHS, so that it stays above _UNREACHED. Only rows
# that hold nothing but decided entries (or nothing at all, where `kept` is 0) move further, by 1 or 2 times this: then
# no path leaves them, and no sum exceeds 4 times this, which 64 bits hold.
_DECIDED = 1 << 60
# Units that the unused capacity exchanges with itself: more than a tile has.
_PLENTY = 1 << 40
# Entries that searches look at in one call of the kernel: a tenth of a second, for which an interrupt waits.
_SEARCHED_AT_ONCE = 1 << 24
# What stands first in the memory of a call, and lasts until the next: the number of the tile in work, the bits of its
# weights that are solved (all below this place are to come), the phase of their flow, and what is left to search.
_TILE, _PLACE, _PHASE, _LEFT = range(4)
_HEADER = 4
# The place of a tile that is yet to be begun.
_UNTOUCHED = 1 << 20


class _Network(NamedTuple):
    """The flow of one tile, with the unused capacity in the last row and column; R and C count them in.

    flow (R, C): units sent from rows to columns. reduced (R, C): importance less the potentials of row and column: not
    negative where there is flow, not positive where there could be more. surplus (C): units beyond `kept`. lowered
    (C): how far the potentials of columns went down.
    """

    flow: NDArray[np.int64]
    reduced: NDArray[np.int64]
    surplus: NDArray[np.int64]
    lowered: NDArray[np.int64]


class _Search(NamedTuple):
    """Memory of a search among nodes: the columns, then the rows.

    distance: of every node. stack: nodes to go on from, or a path. seen: columns that a search has come to. next_row,
    next_column: what it tries next, by column and by row.
    """

    distance: NDArray[np.int64]
    stack: NDArray[np.int64]
    seen: NDArray[np.int64]
    next_row: NDArray[np.int64]
    next_column: NDArray[np.int64]


def new_memory(rows: int, cols: int) -> NDArray[np.int64]:
    """Return the memory in which `solve_tiles` solves rows x cols tiles, for one grid of them."""
    cells = (rows + 1) * (cols + 1)
    memory = np.zeros(_HEADER + 2 * cells + 2 * rows * cols + 8 * (rows + cols + 2), np.int64)
    memory[_PLACE] = _UNTOUCHED
    return memory


@translated_with_vectors
def solve_tiles(importance, kept, exact_rows, exact_columns, judged, masks, potentials, optimal, memory) -> bool:
    """Fill masks (p, q, r, c) with optimal masks of importance (p, q, r, c), and judge other ones.

    It returns now and then, so that interrupts are honoured: whether all is done, or it is to be called again, with the
    same arguments.

    Parameters
    ----------
    importance
        float64, finite, not negative.
    judged
        bool (p, q, r, c), with at most `kept` ones in a line; the masks themselves if there is nothing to judge.
    masks, potentials
        bool (p, q, r, c) and float64 (p, q, c): what to start from; any will do, good ones save work. Potentials are,
        on return, those of an optimal dual solution, rounded.
    optimal
        bool (p, q): is filled with whether the judged masks satisfy the constraint and are optimal.
    memory
        `new_memory`.
    """
    down, across, rows, cols = importance.shape
    cells, lines = (rows + 1) * (cols + 1), rows + cols + 2
    places = memory[_HEADER:]
    network = _Network(
        places[:cells].reshape((rows + 1, cols + 1)),
        places[cells : 2 * cells].reshape((rows + 1, cols + 1)),
        places[2 * cells : 2 * cells + cols + 1],
        places[2 * cells + lines : 2 * cells + lines + cols + 1],
    )
    places = places[2 * cells + 2 * lines :]
    search = _Search(
        places[:lines],
        # A path visits a column once, and between two columns any row.
        places[lines : 3 * lines],
        places[3 * lines : 3 * lines + cols + 1],
        places[4 * lines : 4 * lines + cols + 1],
        places[5 * lines : 5 * lines + rows + 1],
    )
    places = places[6 * lines :]
    mantissas = places[: rows * cols].reshape((rows, cols))
    exponents = places[rows * cols : 2 * rows * cols].reshape((rows, cols))
    memory[_LEFT] = _SEARCHED_AT_ONCE
    while memory[_TILE] < down * across:
        p, q = divmod(memory[_TILE], across)
        if memory[_PLACE] == _UNTOUCHED:
            _split(importance[p, q].view(np.int64), mantissas, exponents)
            _start_from(masks[p, q], kept, exact_rows, network)
        if not _solve(mantissas, exponents, kept, exact_rows, exact_columns, potentials[p, q], network, search, memory):
            return False
        for i in range(rows):
            for j in range(cols):
                masks[p, q, i, j] = network.flow[i, j] > 0
        optimal[p, q] = _is_optimal(judged[p, q], network.reduced, kept)
        memory[_TILE] += 1
        memory[_PLACE] = _UNTOUCHED
    return True


@inner
def _split(bits, mantissas, exponents):
    """Split float64 weights, given as bits, into mantissa * 2**exponent."""
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            field = bits[i, j] >> 52 & 0x7FF
            fraction = bits[i, j] & ((1 << 52) - 1)
            mantissas[i, j] = fraction if field == 0 else fraction | (1 << 52)
            exponents[i, j] = max(field, 1) - 1075


@inner
def _start_from(mask, kept, exact_rows, network):
    """Send `kept` units from every row: where the mask is, then wherever there is room."""
    flow = network.flow
    rows, cols = mask.shape
    flow[:] = 0
    flow[rows, cols] = _PLENTY
    for i in range(rows):
        remaining = kept
        for j in range(cols):
            if mask[i, j] and remaining > 0:
                flow[i, j] = 1
                remaining -= 1
        j = 0
        while exact_rows and remaining > 0:
            if flow[i, j] == 0:
                flow[i, j] = 1
                remaining -= 1
            j += 1
        flow[i, cols] = remaining


@inner
def _solve(mantissas, exponents, kept, exact_rows, exact_columns, potentials, network, search, memory):
    """Go on with a tile; return whether it is solved."""
    rows, cols = mantissas.shape
    lowest, highest = _span(mantissas, exponents)
    # Let W = 2**bits, more than any weight. A shortest path comes to a column once, and potentials cancel along it: it
    # costs at most cols times the largest difference in a row, and the difference of the potentials at its ends. At
    # first that is at most W a row, and potentials start within 4 W: paths to the unused capacity cost up to
    # (cols + 8) W, and those from it, after the potentials have moved, twice that. After bits are appended, differences
    # are up to 2 W and potentials start from 0: 2 cols W, and twice that. Either way potentials have moved by less than
    # 6 (cols + 8) W in the end, and reduced costs are less than 8 (cols + 8) W.
    bits = _BITS_OF_PATHS - _bit_length(8 * (cols + 8))
    # An optimum of the whole weights keeps entries whose reduced cost is at least the number of lines (lemma 4).
    decided_bits = _bit_length(rows + cols + 2)
    has_unused = not (exact_rows and exact_columns)
    first = max(lowest, highest - (_LEADING_BITS if cols <= _LARGEST_OF_LEADING_BITS else bits))

    if memory[_PLACE] == _UNTOUCHED:
        _begin(mantissas, exponents, first, bits, exact_rows, exact_columns, potentials, network)
        _choose(kept, exact_columns, network)
        memory[_PLACE], memory[_PHASE] = first, 0
    while True:
        if not _balance(has_unused, network, search, memory):
            return False
        place = memory[_PLACE]
        for j in range(cols):
            lowered = network.lowered[j] - network.lowered[cols]
            if place == first:
                potentials[j] = np.ldexp(np.float64(potentials[j] - lowered), place)
            else:
                potentials[j] -= np.ldexp(np.float64(lowered), place)
        if place == lowest:
            return True
        # Reduced costs that are not decided have `decided_bits`, and as many more as leaves them below W.
        step = min(bits - decided_bits, place - lowest)
        _append_bits(mantissas, exponents, place - step, step, 1 << decided_bits, network)
        for i in range(rows + 1):
            _settle(i, network)
        _count_surplus(kept, network)
        memory[_PLACE], memory[_PHASE] = place - step, 0


@inner
def _bit_length(number):
    length = 0
    while number >> length > 0:
        length += 1
    return length


@inner
def _span(mantissas, exponents):
    """Return the exponents of the lowest bit that is set in any weight, and of the first above all of them."""
    lowest, highest = 2000, -2000
    for i in range(mantissas.shape[0]):
        for j in range(mantissas.shape[1]):
            mantissa, exponent = mantissas[i, j], exponents[i, j]
            if mantissa == 0:
                continue
            highest = max(highest, exponent + 53)
            # Most weights stop here: bits are counted only where one is lower.
            if lowest - exponent > 0 and mantissa & ((1 << min(lowest - exponent, 62)) - 1) != 0:
                while mantissa & 1 == 0:
                    mantissa >>= 1
                    exponent += 1
                lowest = exponent
    return (lowest, highest) if highest > -2000 else (0, 0)


@inner
def _begin(mantissas, exponents, position, bits, exact_rows, exact_columns, potentials, network):
    """Set up reduced costs in units of 2**position, by potentials that are rounded to units, in place."""
    rows, cols = mantissas.shape
    reduced, lowered = network.reduced, network.lowered
    limit = np.ldexp(4.0, bits)
    for j in range(cols):
        start = np.rint(np.ldexp(potentials[j], -position))
        # NaN is below no limit either.
        potentials[j] = start if abs(start) < limit else 0.0
        if not exact_columns:
            potentials[j] = max(potentials[j], 0.0)
    for i in range(rows):
        for j in range(cols):
            reduced[i, j] = _shifted(mantissas[i, j], exponents[i, j] - position) - np.int64(potentials[j])
        reduced[i, cols] = -_DECIDED if exact_rows else 0
    for j in range(cols):
        reduced[rows, j] = -_DECIDED if exact_columns else -np.int64(potentials[j])
    reduced[rows, cols] = 0
    lowered[:] = 0


@inner
def _shifted(mantissa, shift):
    """Return floor(mantissa * 2**shift), which fits."""
    if shift >= 0:
        return mantissa << shift if mantissa > 0 else 0
    return mantissa >> min(-shift, 63)


@inner
def _choose(kept, exact_columns, network):
    """Give each row its best entries, and columns that need not be full what they lack."""
    flow, surplus = network.flow, network.surplus
    rows, cols = flow.shape[0] - 1, flow.shape[1] - 1
    for i in range(rows):
        _settle(i, network)
    _count_surplus(kept, network)
    if not exact_columns:
        for j in range(cols):
            if surplus[j] < 0 and network.reduced[rows, j] == 0:
                flow[rows, j] = -surplus[j]
                surplus[j] = 0


@inner
def _settle(i, network):
    """Exchange units of row i until it holds its best entries, and move its potential accordingly.

    Decided entries stay as they are: those held have the largest reduced costs, and the others the smallest.
    """
    flow, reduced = network.flow, network.reduced
    rows, cols = flow.shape[0] - 1, flow.shape[1] - 1
    while True:
        worst, best = 2 * _DECIDED, -2 * _DECIDED
        given_up, taken = -1, -1
        for j in range(cols + 1):
            cost = reduced[i, j]
            if flow[i, j] > 0 and cost < worst:
                worst, given_up = cost, j
            if (flow[i, j] == 0 or j == cols or i == rows) and cost > best:
                best, taken = cost, j
        if worst >= best:
            break
        flow[i, given_up] -= 1
        flow[i, taken] += 1
    for j in range(cols + 1):
        reduced[i, j] -= worst


@inner
def _count_surplus(kept, network):
    cols = network.flow.shape[1] - 1
    for j in range(cols):
        network.surplus[j] = -kept
    network.surplus[cols] = 0
    for i in range(network.flow.shape[0]):
        for j in range(cols):
            network.surplus[j] += network.flow[i, j]


@inner
def _balance(has_unused, network, search, memory):
    """Move units until no column has a surplus or lacks any, and return True; False where there is too much to do."""
    surplus = network.surplus
    cols = len(surplus) - 1
    while memory[_PHASE] < (2 if has_unused else 1):
        while True:
            # The unused capacity takes what is too much at first, and gives what is lacking then.
            surplus[cols] = 0 if not has_unused else _PLENTY if memory[_PHASE] == 1 else -_PLENTY
            if not _has_both_signs(surplus):
                break
            if memory[_LEFT] <= 0:
                return False
            length = _find_shortest(network, search)
            _lower(length, network, search)
            _send(network, search)
            memory[_LEFT] -= len(search.distance) * len(search.distance)
        memory[_PHASE] += 1
    return True


@inner
def _has_both_signs(surplus):
    is_positive = is_negative = False
    for j in range(len(surplus)):
        is_positive |= surplus[j] > 0
        is_negative |= surplus[j] < 0
    return is_positive and is_negative


@inner
def _find_shortest(network, search):
    """Return the length of the shortest paths from columns with a surplus to columns that lack units.

    Fills the distance of every node that is not farther, and something not less for others.
    """
    flow, reduced, surplus = network.flow, network.reduced, network.surplus
    distance, stack = search.distance, search.stack
    rows, cols = flow.shape[0] - 1, flow.shape[1] - 1
    columns = cols + 1
    distance[:] = _UNREACHED
    level, count = 0, 0
    for j in range(columns):
        if surplus[j] > 0:
            distance[j] = 0
            stack[count] = j
            count += 1
    while True:
        while count > 0:
            count -= 1
            node = stack[count]
            if node < columns:
                if surplus[node] < 0:
                    return level
                for i in range(rows + 1):
                    # Of decided entries this is above _UNREACHED, so that they are never taken.
                    length = level + reduced[i, node]
                    if flow[i, node] > 0 and length < distance[columns + i]:
                        distance[columns + i] = length
                        if length == level:
                            stack[count] = columns + i
                            count += 1
            else:
                i = node - columns
                for j in range(columns):
                    length = level - reduced[i, j]
                    if length < distance[j] and (flow[i, j] == 0 or j == cols or i == rows):
                        distance[j] = length
                        if length == level:
                            stack[count] = j
                            count += 1
        following = _UNREACHED
        for node in range(len(distance)):
            if level < distance[node] < following:
                following = distance[node]
        level = following
        for node in range(len(distance)):
            if distance[node] == level:
                stack[count] = node
                count += 1


@inner
def _lower(length, network, search):
    """Move potentials by the distances, as far as `length`, which makes the shortest paths cost nothing."""
    reduced, lowered, distance = network.reduced, network.lowered, search.distance
    columns = len(lowered)
    if length == 0:
        return
    for node in range(len(distance)):
        distance[node] = min(distance[node], length)
    for j in range(columns):
        lowered[j] += distance[j]
    for i in range(len(distance) - columns):
        for j in range(columns):
            reduced[i, j] += distance[j] - distance[columns + i]


@inner
def _send(network, search):
    """Send units along paths that cost nothing, depth first, until every column seen is known to lead nowhere."""
    search.seen[:] = 0
    search.next_row[:] = 0
    search.next_column[:] = 0
    for j in range(len(network.surplus)):
        while network.surplus[j] > 0 and search.seen[j] == 0 and _send_one(j, network, search):
            pass


@inner
def _send_one(source, network, search):
    flow, reduced, surplus = network.flow, network.reduced, network.surplus
    seen, next_row, next_column, path = search.seen, search.next_row, search.next_column, search.stack
    rows, cols = flow.shape[0] - 1, flow.shape[1] - 1
    # path: a column, the row through which it goes on, the next column, ...
    path[0] = source
    seen[source] = 1
    length = 1
    while length > 0:
        j = path[length - 1]
        if surplus[j] < 0:
            for step in range(0, length - 1, 2):
                flow[path[step + 1], path[step]] -= 1
                flow[path[step + 1], path[step + 2]] += 1
                seen[path[step]] = 0
            seen[j] = 0
            surplus[source] -= 1
            surplus[j] += 1
            return True
        found = -1
        while next_row[j] <= rows:
            i = next_row[j]
            if flow[i, j] > 0 and reduced[i, j] == 0:
                while next_column[i] <= cols:
                    k = next_column[i]
                    if reduced[i, k] == 0 and seen[k] == 0 and (flow[i, k] == 0 or k == cols or i == rows):
                        found = k
                        break
                    next_column[i] += 1
            if found >= 0:
                break
            next_row[j] += 1
        if found >= 0:
            path[length] = next_row[j]
            path[length + 1] = found
            seen[found] = 1
            length += 2
        else:
            length -= 2
    return False


@inner
def _append_bits(mantissas, exponents, position, step, decided, network):
    """Go on to units of 2**position, `step` bits further down; entries with |r| >= `decided` are decided."""
    reduced = network.reduced
    rows, cols = mantissas.shape
    lowest_bits = (1 << step) - 1
    for i in range(rows + 1):
        for j in range(cols + 1):
            if abs(reduced[i, j]) >= decided:
                reduced[i, j] = _DECIDED if reduced[i, j] > 0 else -_DECIDED
            else:
                reduced[i, j] <<= step
                if i < rows and j < cols:
                    shift = exponents[i, j] - position
                    # A shift to the left may lose leading bits, which are not asked for.
                    if shift < step:
                        reduced[i, j] += _shifted(mantissas[i, j], shift) & lowest_bits
    network.lowered[:] = 0


@inner
def _is_optimal(mask, reduced, kept):
    """Return whether a mask with at most `kept` ones in a line is optimal: exactly, by complementary slackness.

    (1) and (2) of docs/proof.md: an entry that is worth more than its lines is kept, one that is worth less is not, and
    a line that is worth something is full.
    """
    rows, cols = mask.shape
    full = True
    for i in range(rows):
        count = 0
        for j in range(cols):
            count += mask[i, j]
            if reduced[i, j] < 0 if mask[i, j] else reduced[i, j] > 0:
                return False
        full &= count == kept or reduced[i, cols] >= 0
    for j in range(cols):
        count = 0
        for i in range(rows):
            count += mask[i, j]
        full &= count == kept or reduced[rows, j] >= 0
    return full
