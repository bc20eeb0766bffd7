"""The number of masks of a tile, as an exact integer: dynamic programming over histograms of column loads.

What later rows may do depends only on how many columns hold 0, 1, ..., N ones already, not on which. Half of the
rows is enough: a mask is an upper and a lower half whose column loads together make N (or at most N).

A state is one integer of equal fields: the lowest is how many ones the current row has yet to place, field l + 1 how
many columns hold l ones. Its value is the number of 0/1 matrices, columns told apart, that lead there. A row is
added load by load from the fullest columns down, which keeps states few: one step decides only how many columns of
one load the row takes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, lru_cache

from masksolve._tiles import Margins

States = dict[int, int]


@lru_cache(maxsize=256)
def count_masks(rows: int, cols: int, margins: Margins, one: int = 1) -> int:
    """Return the number of 0/1 matrices (rows, cols) that `margins` allow; each weighs `one` to the power of its ones.

    >>> count_masks(8, 8, Margins(4, True, True))
    116963796250
    """
    kept, exact_columns = margins.kept, margins.exact_columns
    if kept == 0:
        return 1
    upper_rows, lower_rows = rows // 2, rows - rows // 2
    halves = dict(enumerate(_after_each_row(lower_rows, cols, kept, margins.exact_rows)))
    upper = _weigh(halves[upper_rows], cols, one)
    lower = _weigh(halves[lower_rows], cols, one)
    fullest = min(kept, lower_rows)
    if not exact_columns:
        lower = _up_to(lower, cols, fullest)

    total = 0
    for histogram, ways in upper.items():
        loads = unpack(histogram, cols)
        if exact_columns and kept - loads[0] > fullest:
            continue
        room = [min(kept - load, fullest) for load in loads]
        total += ways * lower.get(pack(room, cols), 0) // arrangements(room)
    return total


@lru_cache(maxsize=16)
def counts_by_ones(m: int, n: int) -> tuple[int, ...]:
    """Return, as entry j, how many 0/1 matrices (m, m) have j ones and at most n in every row and column.

    >>> counts_by_ones(2, 1)
    (1, 4, 2)
    """
    # A weight of 2**bits for every one writes the counts side by side into one integer: none reaches 2**bits.
    bits = m * m + 1
    packed = count_masks(m, m, Margins(n, False, False), 1 << bits)
    return tuple(packed >> bits * ones & (1 << bits) - 1 for ones in range(m * n + 1))


def log10_states(rows: int, cols: int, margins: Margins) -> float:
    """Estimate, within a factor of 3, how many states `count_masks` visits."""
    kept, exact = margins.kept, margins.exact_rows
    if kept == 0:
        return 0.0
    logs = [0.0]
    for row in range(1, rows - rows // 2 + 1):
        fullest = min(kept, row)
        # Multisets of `cols` loads 0..fullest; where their sum is fixed, its share by the central limit theorem.
        log = math.lgamma(cols + fullest + 1) - math.lgamma(cols + 1) - math.lgamma(fullest + 1)
        if exact:
            variance = cols * fullest * (cols + fullest + 1) / 12
            distance = row * min(kept, cols) - cols * fullest / 2
            log -= distance**2 / (2 * variance) + math.log(2 * math.pi * variance) / 2
        logs.append(max(log, 0.0))
    largest = max(logs)
    log_states = largest + math.log(sum(math.exp(log - largest) for log in logs))
    steps_per_row = max(1.0, kept**2 * (0.6 if exact else 0.25))
    return (log_states + math.log(steps_per_row)) / math.log(10)


def log10_seconds(rows: int, cols: int, margins: Margins) -> float:
    """Estimate the time that `count_masks` takes: a microsecond per state, and more where counts are long."""
    half = rows - rows // 2
    bits = half * math.log2(math.comb(cols, min(margins.kept, cols)))
    return log10_states(rows, cols, margins) - 6 + math.log10(1 + bits / 3000)


def pack(loads: list[int], cols: int) -> int:
    """Return the histogram of column loads as one integer."""
    field = cols.bit_length()
    return sum(1 << field * load for load in loads)


def unpack(histogram: int, cols: int) -> list[int]:
    """Return the column loads, ascending, of a histogram."""
    field = cols.bit_length()
    loads: list[int] = []
    load = 0
    while histogram:
        loads += [load] * (histogram & (1 << field) - 1)
        histogram >>= field
        load += 1
    return loads


def arrangements(loads: list[int]) -> int:
    """Return in how many orders the columns can carry these loads."""
    return math.factorial(len(loads)) // math.prod(math.factorial(loads.count(load)) for load in set(loads))


def steps(rows: int, cols: int, kept: int, exact_rows: bool) -> Iterator[tuple[int, int, States]]:
    """Fill rows one by one: (row, load, states) once the row has taken its columns of that load and of fuller ones.

    The row is done at load 0. With `exact_rows` its ones are all placed by then, else any number of them may be left.
    """
    field = cols.bit_length()
    mask = (1 << field) - 1
    states: States = {cols << field: 1}
    for row in range(rows):
        started: defaultdict[int, int] = defaultdict(int)
        for state, ways in states.items():
            started[(state >> field << field) + min(kept, cols)] += ways
        states = started
        for load in reversed(range(min(row + 1, kept))):
            at = field * (load + 1)
            take_one = (1 << at + field) - (1 << at) - 1
            following: defaultdict[int, int] = defaultdict(int)
            for state, ways in states.items():
                to_place = state & mask
                binomials = _binomials(state >> at & mask, to_place)
                fewest = to_place if exact_rows and load == 0 else 0
                for taken in range(fewest, len(binomials)):
                    following[state + taken * take_one] += ways * binomials[taken]
            states = following
            yield row, load, states


def _after_each_row(rows: int, cols: int, kept: int, exact_rows: bool) -> Iterator[States]:
    """Return the ways to every histogram of column loads, after 0, 1, ..., rows rows."""
    yield {cols: 1}
    field = cols.bit_length()
    for _, load, states in steps(rows, cols, kept, exact_rows):
        if load == 0:
            histograms: defaultdict[int, int] = defaultdict(int)
            for state, ways in states.items():
                histograms[state >> field] += ways
            yield histograms


def _weigh(states: States, cols: int, one: int) -> States:
    return {histogram: ways * one ** sum(unpack(histogram, cols)) for histogram, ways in states.items()}


def _up_to(states: States, cols: int, fullest: int) -> States:
    """Return the ways to stay below limits, by the histogram of limits: every column's limit rises from its load."""
    field = cols.bit_length()
    mask = (1 << field) - 1
    for load in range(fullest):
        at = field * load
        raise_one = (1 << at + field) - (1 << at)
        following: defaultdict[int, int] = defaultdict(int)
        for histogram, ways in states.items():
            for raised, binomial in enumerate(_binomials(histogram >> at & mask, cols)):
                following[histogram + raised * raise_one] += ways * binomial
        states = following
    return states


@cache
def _binomials(columns: int, most: int) -> list[int]:
    """Return the binomials C(columns, 0), C(columns, 1), ..., up to C(columns, most)."""
    return [math.comb(columns, taken) for taken in range(min(columns, most) + 1)]
