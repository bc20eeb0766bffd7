"""The judge's functions in plain Numba: what `codegen` emits as machine code, bit for bit."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

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
    OUTPUTS,
    OVERFULL,
    PROVEN,
    TOTAL,
    UNROUNDED,
    WITHOUT_ZEROS,
    WRONG,
    Program,
    group_of,
    unpack,
)
from masksolve._translated import inner


@cache
def program(rows: int, columns: int, itemsize: int) -> Program:
    """Return the functions for tiles of this shape, of floats of this size."""
    return Program(0, 0, 0, columns, itemsize, group_of(rows, columns, itemsize))


def _pointer(typingctx, address):
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), codegen


_pointer_: Any = intrinsic(_pointer)


@inner
def _number(address, index, itemsize):
    if itemsize == 4:
        return np.float64(carray(_pointer_(address + 4 * index), (1,), np.float32)[0])
    return carray(_pointer_(address + 8 * index), (1,), np.float64)[0]


@inner
def _is_one(address, index):
    return carray(_pointer_(address + index), (1,), np.uint8)[0] != 0


@inner
def _difference(c, v, itemsize):
    if itemsize == 4:
        return np.float64(np.float32(c) - np.float32(v))
    return c - v


@inner
def _sum(lanes):
    """Add up as a vector does: its halves, again and again."""
    half = len(lanes) // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
        half //= 2
    return lanes[0]


@inner
def _width(columns):
    width = 1
    while width < columns:
        width *= 2
    return width


@inner
def prove(program, weights, weights_row, mask, mask_row, potentials, rows, reading, out):
    """See `interface`."""
    program = unpack(program)
    columns, size = program.columns, program.itemsize
    n = reading & 0xFFFF
    exact_rows, exact_columns = reading & EXACT_ROWS != 0, reading & EXACT_COLUMNS != 0
    least_kept_weight = 0.0 if reading & WITHOUT_ZEROS != 0 else -1.0
    width = _width(columns)
    total, kept = np.zeros(program.group * width), np.zeros(program.group * width)
    sums = np.zeros(columns, np.int64)
    full_rows, full_columns, overfull, ordered, largest, least = True, True, False, True, 0.0, np.inf
    finite = True
    for i in range(rows):
        row, mask_of_row = weights + i * weights_row, mask + i * mask_row
        count, lowest = 0, np.inf
        for j in range(columns):
            c = abs(_number(row, j, size))
            finite &= c < np.inf
            largest, least = max(largest, c), min(least, c)
            lane = i % program.group * width + j
            total[lane] += c
            if _is_one(mask_of_row, j) and c > least_kept_weight:
                kept[lane] += c
                sums[j] += 1
                count += 1
                difference = _difference(c, _number(potentials, j, size), size)
                if difference < lowest:
                    lowest = difference
        is_full = count == n
        full_rows &= is_full
        overfull |= count > n
        ordered &= exact_rows or lowest >= 0
        for j in range(columns):
            c = abs(_number(row, j, size))
            if not (_is_one(mask_of_row, j) and c > least_kept_weight):
                difference = _difference(c, _number(potentials, j, size), size)
                ordered &= not (difference >= lowest if is_full else difference > 0)
    for j in range(columns):
        v = _number(potentials, j, size)
        # NaN compares false both ways, so it would slip through as proven.
        ordered &= math.isfinite(v)
        is_full = sums[j] == n
        full_columns &= is_full
        overfull |= sums[j] > n
        ordered &= exact_columns or (is_full and v >= 0) or v == 0
    filled = (full_rows or not exact_rows) and (full_columns or not exact_columns)
    # Where all weights are the same, every mask that is full is as good; where they are zero, every one.
    is_constant = largest == least and full_rows and full_columns
    proven = (ordered or largest == 0 or is_constant) and filled and not overfull and finite
    results: Any = carray(_pointer_(out), (OUTPUTS,), np.float64)
    results[TOTAL], results[KEPT] = _sum(total), _sum(kept)
    return (
        (PROVEN if proven else 0)
        | (FILLED if filled else 0)
        | (OVERFULL if overfull else 0)
        | (0 if finite else NOT_FINITE)
        | (HAS_ZEROS if least == 0 else 0)
    )


@inner
def weigh(program, weights, weights_row, mask, mask_row, potentials, rows, reading, out):
    """See `interface`."""
    program = unpack(program)
    columns, size = program.columns, program.itemsize
    n = reading & 0xFFFF
    exact_rows, exact_columns = reading & EXACT_ROWS != 0, reading & EXACT_COLUMNS != 0
    least_kept_weight = 0.0 if reading & WITHOUT_ZEROS != 0 else -1.0
    width = _width(columns)
    wrong, sums = np.zeros(program.group * width), np.zeros(columns, np.int64)
    clearance, largest, farthest = np.inf, 0.0, 0.0
    unrounded, not_negative = True, True
    # Written as an integer, to be read as a number.
    bits = np.empty(1, np.int64)
    number = bits.view(np.float64)
    for i in range(rows):
        row, mask_of_row = weights + i * weights_row, mask + i * mask_row
        count, lowest, highest = 0, np.inf, -np.inf
        for j in range(columns):
            c, v = abs(_number(row, j, size)), _number(potentials, j, size)
            difference = c - v
            # Knuth's two-sum: what was rounded off.
            back = c - difference
            unrounded &= (c - (difference + back)) + (back - v) == 0
            if _is_one(mask_of_row, j) and c > least_kept_weight:
                count += 1
                sums[j] += 1
                lowest = min(lowest, difference)
            else:
                highest = max(highest, difference)
        middle = (lowest + highest) * 0.5
        if not exact_rows:
            # Rows that may hold fewer than n have a potential that is not negative, and 0 if they do.
            middle = middle if count == n and middle > 0 else 0.0
        for j in range(columns):
            c = abs(_number(row, j, size))
            difference = c - _number(potentials, j, size)
            is_kept = _is_one(mask_of_row, j) and c > least_kept_weight
            right = difference - middle if is_kept else middle - difference
            if not right >= 0:
                wrong[i % program.group * width + j] += 0.0 - right
            if c > 0:
                # Without the lowest bit of its mantissa, a float has lost the largest power of two that divides it.
                number[0] = c
                is_power = bits[0] & ((1 << 52) - 1) == 0
                bits[0] &= bits[0] - 1
                divisor = c if is_power else c - number[0]
                clearance, largest = min(clearance, max(0.5 * right, divisor)), max(largest, c)
    for j in range(columns):
        v = _number(potentials, j, size)
        farthest = max(farthest, abs(v))
        if not exact_columns:
            wrong[j] += (n - sums[j]) * v
            not_negative &= v >= 0
    results: Any = carray(_pointer_(out), (OUTPUTS,), np.float64)
    results[WRONG], results[CLEARANCE] = _sum(wrong), clearance
    results[LARGEST], results[FARTHEST] = largest, farthest
    return (UNROUNDED if unrounded else 0) | (NOT_NEGATIVE if not_negative else 0)


@inner
def differ(program, other, other_row, mask, mask_row, rows):
    """See `interface`."""
    columns = unpack(program).columns
    for i in range(rows):
        for j in range(columns):
            if _is_one(other + i * other_row, j) != _is_one(mask + i * mask_row, j):
                return 1
    return 0
