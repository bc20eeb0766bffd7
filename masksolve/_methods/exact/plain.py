"""The inner loops of equilibration in plain Numba: what `codegen` emits as machine code, lane for lane.

Only Numba's public API is used. Every number is computed by the same operations in the same order, so masks and
potentials are the same, bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic
from numpy.typing import NDArray

from masksolve import _networks
from masksolve._methods.exact.layout import (
    CLEARANCE,
    ENTRIES,
    LARGEST,
    LEAST,
    LOWEST,
    NONZERO,
    OFFSETS,
    QUANTUM,
    SHORT,
    SMALLEST,
    STRICT,
    STRICT_ROWS,
    THRESHOLD,
    WORD_BITS,
    WORST,
    WRONG,
    ZERO,
    ZEROS,
    Layout,
    layout,
    layout_in,
    new_program,
    word,
)
from masksolve._translated import inner

_LOAD, _MOVE_ROWS, _MOVE_COLUMNS, _CHOOSE, _JUDGE, _FILL, _FIND_ZEROS, _MEASURE, _PERTURB, _WEIGH, _STORE = range(11)

# What the functions need to know of a pattern: the layout, n, m, the size of a weight, which values of the selection
# network are its outputs, and its steps, three numbers each.
_N = len(Layout._fields)
_M, _SOURCE, _NTH, _FOLLOWING, _STEPS = range(_N + 1, _N + 6)


@cache
def program(n: int, m: int, itemsize: int, source_itemsize: int) -> NDArray[np.int64]:
    """Return all that a kernel needs to know, for `unpack`: of a pattern, and of numbers and weights of these sizes."""
    functions = _functions(n, m, itemsize, source_itemsize)
    return new_program([function.ctypes.data for function in functions], n, m, itemsize)


class _Function(NamedTuple):
    """The record at the address of a function: which one it is, whether it clamps, and where its pattern lies."""

    which: int
    clamp: bool
    pattern: int
    pattern_length: int


@cache  # without a limit: kernels hold the addresses
def _functions(n: int, m: int, itemsize: int, source_itemsize: int) -> NDArray[np.int64]:
    """Return the numbers of a `_Function` for each of `Code`, without and then with clamp, a row each."""
    pattern = _pattern(n, m, itemsize, source_itemsize)
    where = pattern.ctypes.data, len(pattern)
    functions = [_Function(which, clamp, *where) for clamp in (False, True) for which in range(_STORE + 1)]
    return np.array(functions, np.int64)


@cache
def _pattern(n: int, m: int, itemsize: int, source_itemsize: int) -> NDArray[np.int64]:
    network = _networks.selection_network(n, m)
    steps = [number for step in network.steps for number in step]
    return np.array([*layout(m, itemsize), n, m, source_itemsize, network.nth, network.following, *steps], np.int64)


def _pointer(typingctx, address):
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), codegen


pointer: Any = intrinsic(_pointer)


@inner
def call(function, vectors, a, b, c, x):
    """Call one of the functions of `Code`."""
    numbers = carray(pointer(function), (4,), np.int64)
    found = _Function(numbers[0], numbers[1] != 0, numbers[2], numbers[3])
    pattern = carray(pointer(found.pattern), (found.pattern_length,), np.int64)
    # As integers of one type, or Numba would compile it for every constant that it is called with.
    _run(found.which, found.clamp, pattern, vectors, np.int64(a), np.int64(b), np.int64(c), x)


@inner
def _run(which, clamp, pattern, vectors, a, b, c, x):
    if which == _LOAD:
        _load(pattern, vectors, a, b)
    elif which in (_MOVE_ROWS, _MOVE_COLUMNS):
        _move(pattern, vectors, clamp, which == _MOVE_ROWS, c, x)
    elif which == _CHOOSE:
        _choose(pattern, vectors, clamp, c)
    elif which == _JUDGE:
        _judge(pattern, vectors, clamp)
    elif which == _FILL:
        _fill(pattern, vectors, c)
    elif which == _FIND_ZEROS:
        _find_zeros(pattern, vectors)
    elif which == _MEASURE:
        _measure(pattern, vectors)
    elif which == _PERTURB:
        _perturb(pattern, vectors, a, b, c)
    elif which == _WEIGH:
        _weigh(pattern, vectors, clamp, a, c)
    else:
        _store(pattern, vectors, a, b, c)


@inner
def _load(pattern, vectors, address, row_step):
    m, size = pattern[_M], pattern[_SOURCE]
    at, numbers, integers = layout_in(pattern, 0), vectors.numbers, vectors.integers
    for lane in range(at.lanes):
        first = address + vectors.words[word(at, OFFSETS, 0, lane)] * size
        largest, least = 0, np.iinfo(np.int64).max
        for i in range(m):
            row = ENTRIES + i * at.pitch
            start = pointer(first + i * row_step * size)
            for j in range(m):
                if size == 4:
                    numbers[row + j, lane] = abs(carray(start, (m,), np.float32)[j])
                else:
                    numbers[row + j, lane] = abs(carray(start, (m,), np.float64)[j])
            for j in range(m):
                bits = integers[row + j, lane]
                largest, least = max(largest, bits), min(least, bits)
        integers[LARGEST, lane] = largest
        integers[LEAST, lane] = least


@inner
def pick(is_max, a, b):
    """Return max or min, as the instructions have it: b where neither is larger, or one is NaN."""
    if is_max:
        return a if a > b else b
    return a if a < b else b


@inner
def _reduced(pattern, vectors, wires, line, rows):
    """Fill wires (values, lanes) with a line's entries, less the potentials of the lines across, and what follows.

    The selection network makes each of its values of two that stand before it.
    """
    m, at, work = pattern[_M], layout_in(pattern, 0), vectors.numbers
    for k in range(m):
        entry = ENTRIES + (line * at.pitch + k if rows else k * at.pitch + line)
        potential = (at.v if rows else at.u) + k
        for lane in range(at.lanes):
            wires[k, lane] = work[entry, lane] - work[potential, lane]
    for k in range(m, len(wires)):
        step = _STEPS + 3 * (k - m)
        is_max, a, b = pattern[step] != 0, pattern[step + 1], pattern[step + 2]
        for lane in range(at.lanes):
            wires[k, lane] = pick(is_max, wires[a, lane], wires[b, lane])


@inner
def _new_wires(pattern, vectors):
    # One value per entry of the line, and one per step of the network.
    values = pattern[_M] + (len(pattern) - _STEPS) // 3
    return np.empty((values, layout_in(pattern, 0).lanes), vectors.numbers.dtype)


@inner
def _middle(vectors, clamp, nth, following):
    number = vectors.numbers.dtype.type
    if clamp:
        nth, following = pick(True, nth, number(0)), pick(True, following, number(0))
    return (nth + following) * number(0.5)


@inner
def _is_chosen(clamp, value, nth):
    return value >= nth and (value > 0 or not clamp)


@inner
def _move(pattern, vectors, clamp, rows, count, x):
    at, work = layout_in(pattern, 0), vectors.numbers
    number = work.dtype.type
    share = number(x)
    wires = _new_wires(pattern, vectors)
    for line in range(count):
        _reduced(pattern, vectors, wires, line, rows)
        potential = (at.u if rows else at.v) + line
        for lane in range(at.lanes):
            middle = _middle(vectors, clamp, wires[pattern[_NTH], lane], wires[pattern[_FOLLOWING], lane])
            old = work[potential, lane]
            new = old + share * (middle - old)
            work[potential, lane] = pick(True, new, number(0)) if clamp else new


@inner
def _choose(pattern, vectors, clamp, rows):
    m, at = pattern[_M], layout_in(pattern, 0)
    work, integers, words = vectors.numbers, vectors.integers, vectors.words
    lanes = at.lanes
    wires = _new_wires(pattern, vectors)
    for lane in range(lanes):
        integers[STRICT_ROWS, lane] = -1
        work[WORST, lane] = np.inf
        for k in range(m):
            integers[at.counts + k, lane] = 0
    for row in range(rows):
        _reduced(pattern, vectors, wires, row, True)
        best = at.best + 2 * row
        for lane in range(lanes):
            nth, following = wires[pattern[_NTH], lane], wires[pattern[_FOLLOWING], lane]
            work[best, lane] = nth
            work[best + 1, lane] = _middle(vectors, clamp, nth, following)
            # A row that takes fewer than n takes all that is above 0: there is nothing to tie with.
            if not (nth > following or (clamp and nth <= 0)):
                integers[STRICT_ROWS, lane] = 0
            for number in range(at.row_words):
                words[_row_word(at, at.bits, row, number, lane)] = 0
            for k in range(m):
                if _is_chosen(clamp, wires[k, lane], nth):
                    integers[at.counts + k, lane] += 1
                    words[_row_word(at, at.bits, row, k // WORD_BITS, lane)] |= _bit(k)
            work[WORST, lane] = pick(False, work[WORST, lane], nth)
    _judge(pattern, vectors, clamp)


@inner
def _row_word(at, vector, row, number, lane):
    return word(at, vector, row * at.row_words + number, lane)


@inner
def _bit(k):
    return np.int64(1) << (k % WORD_BITS)


@inner
def _judge(pattern, vectors, clamp):
    n, m, at = pattern[_N], pattern[_M], layout_in(pattern, 0)
    work, integers = vectors.numbers, vectors.integers
    number = work.dtype.type
    for lane in range(at.lanes):
        lowest, wrong = number(np.inf), number(0)
        integers[STRICT, lane] = integers[STRICT_ROWS, lane]
        for k in range(m):
            potential = work[at.v + k, lane]
            count = integers[at.counts + k, lane]
            if not (count <= n and potential >= 0 if clamp else count == n):
                integers[STRICT, lane] = 0
            wrong += number(n - count) * potential
            lowest = pick(False, lowest, potential)
        work[LOWEST, lane] = lowest
        work[WRONG, lane] = wrong if clamp else number(0)


@inner
def _fill(pattern, vectors, rows):
    n, m, at = pattern[_N], pattern[_M], layout_in(pattern, 0)
    integers, words = vectors.integers, vectors.words
    for lane in range(at.lanes):
        short = np.int64(0)
        for row in range(rows):
            room = n
            for number in range(at.row_words):
                ones = words[_row_word(at, at.bits, row, number, lane)]
                while ones != 0:
                    room -= 1
                    ones &= ones - 1
            # Each row starts at another column, or the first columns would be full before the last rows come.
            for k in range(m):
                column = (row + k) % m
                counts = at.counts + column
                place = _row_word(at, at.bits, row, column // WORD_BITS, lane)
                free = words[_row_word(at, at.zero_bits, row, column // WORD_BITS, lane)] & ~words[place]
                if free & _bit(column) != 0 and room > 0 and integers[counts, lane] < n:
                    words[place] |= _bit(column)
                    room -= 1
                    integers[counts, lane] += 1
            short |= room
        integers[SHORT, lane] = short


@inner
def _find_zeros(pattern, vectors):
    m, at, work = pattern[_M], layout_in(pattern, 0), vectors.numbers
    for lane in range(at.lanes):
        count = 0
        for i in range(m):
            for number in range(at.row_words):
                vectors.words[_row_word(at, at.zero_bits, i, number, lane)] = 0
            for j in range(m):
                if work[ENTRIES + i * at.pitch + j, lane] == 0:
                    count += 1
                    vectors.words[_row_word(at, at.zero_bits, i, j // WORD_BITS, lane)] |= _bit(j)
        work[ZEROS, lane] = count


@inner
def _measure(pattern, vectors):
    m, at, work, integers = pattern[_M], layout_in(pattern, 0), vectors.numbers, vectors.integers
    mantissa_bits = 23 if work.itemsize == 4 else 52
    for lane in range(at.lanes):
        quantum = smallest = work.dtype.type(np.inf)
        for k in range(m * m):
            place = ENTRIES + k // m * at.pitch + k % m
            entry, bits = work[place, lane], integers[place, lane]
            if entry <= 0:
                continue
            # Without the lowest bit of its mantissa, a float has lost just the largest power of two that divides it.
            # Written as an integer, to be read as a number.
            integers[at.scratch, lane] = bits & (bits - 1)
            is_power = bits & ((1 << mantissa_bits) - 1) == 0
            divisor = entry if is_power else entry - work[at.scratch, lane]
            quantum = pick(False, quantum, divisor)
            smallest = pick(False, smallest, entry)
        work[QUANTUM, lane] = quantum
        work[SMALLEST, lane] = smallest


@inner
def _perturb(pattern, vectors, address, zero, nonzero):
    m, at, work = pattern[_M], layout_in(pattern, 0), vectors.numbers
    shares = carray(pointer(address), (m * m,), work.dtype)
    for k in range(m * m):
        place = ENTRIES + k // m * at.pitch + k % m
        for lane in range(at.lanes):
            entry = work[place, lane]
            delta = work[zero if entry <= work[ZERO, lane] else nonzero, lane]
            work[place, lane] = entry + shares[k] * delta


@inner
def _weigh(pattern, vectors, clamp, address, rows):
    m, at, work = pattern[_M], layout_in(pattern, 0), vectors.numbers
    lanes, number = at.lanes, work.dtype.type
    shares = carray(pointer(address), (m * m,), work.dtype)
    wires = _new_wires(pattern, vectors)
    for lane in range(lanes):
        work[CLEARANCE, lane] = work[THRESHOLD, lane] = np.inf
    for row in range(rows):
        _reduced(pattern, vectors, wires, row, True)
        best = at.best + 2 * row
        for lane in range(lanes):
            zero, nonzero = work[ZERO, lane], work[NONZERO, lane]
            nth, threshold = work[best, lane], work[best + 1, lane]
            wrong, clearance = work[WRONG, lane], work[CLEARANCE, lane]
            for k in range(m):
                is_zero = work[ENTRIES + row * at.pitch + k, lane] <= zero
                perturbation = shares[row * m + k] * (zero if is_zero else nonzero)
                right = (wires[k, lane] - threshold) - perturbation
                if not _is_chosen(clamp, wires[k, lane], nth):
                    right = number(0) - right
                wrong = wrong - pick(False, right, number(0))
                if not is_zero:
                    clearance = pick(False, clearance, right)
            work[WRONG, lane] = wrong
            work[CLEARANCE, lane] = clearance
            work[THRESHOLD, lane] = pick(False, work[THRESHOLD, lane], threshold)


@inner
def _store(pattern, vectors, address, row_step, lane):
    m, at = pattern[_M], layout_in(pattern, 0)
    for i in range(m):
        row = carray(pointer(address + i * row_step), (m,), np.uint8)
        for j in range(m):
            bits = vectors.words[_row_word(at, at.bits, i, j // WORD_BITS, lane)]
            row[j] = (bits >> (j % WORD_BITS)) & 1
