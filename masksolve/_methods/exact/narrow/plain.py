"""The functions of `Code` in plain Numba: what `codegen` emits as machine code, lane for lane.

Only Numba's public API is used. Every number is computed by the same operations in the same order, so masks and
potentials are the same, bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import carray  # type: ignore[attr-defined]
from numpy.typing import NDArray

from masksolve import _networks
from masksolve._methods.exact.narrow.layout import (
    FARTHEST,
    FARTHEST_BELOW,
    HALF,
    KEEP_COLUMNS,
    KEEP_ROWS,
    LANES,
    Code,
    Layout,
    layout,
    layout_in,
    new_program,
)
from masksolve._methods.exact.plain import pick, pointer
from masksolve._translated import inner

_LOAD, _MOVE_ROWS, _MOVE_COLUMNS, _PROVE, _LOAD_PERTURBED, _PROVE_PERTURBED, _FIND_LOWEST, _FILL, _STORE_FILLED = range(
    len(Code._fields)
)


class _Shape(NamedTuple):
    """A shape as the functions need it: its margins, the size of a weight, and where the networks begin."""

    n: int
    rows: int
    cols: int
    clamp_rows: int
    clamp_columns: int
    itemsize: int
    row_network: int
    column_network: int


@cache
def program(n: int, rows: int, cols: int, clamp_rows: bool, clamp_columns: bool, itemsize: int) -> NDArray[np.int64]:
    """Return, for `unpack`, the functions for r x c tiles of weights of this size, with clamps at 0 or without."""
    functions = _functions(n, rows, cols, clamp_rows, clamp_columns, itemsize)
    return new_program([function.ctypes.data for function in functions], rows, cols)


@cache  # without a limit: kernels hold the addresses
def _functions(n: int, rows: int, cols: int, clamp_rows: bool, clamp_columns: bool, itemsize: int) -> NDArray[np.int64]:
    """Return, for each of `Code`, which it is, and the address and the length of its numbers: a row each."""
    numbers = _numbers(n, rows, cols, clamp_rows, clamp_columns, itemsize)
    return np.array([(which, numbers.ctypes.data, len(numbers)) for which in range(len(Code._fields))], np.int64)


@cache
def _numbers(n: int, rows: int, cols: int, clamp_rows: bool, clamp_columns: bool, itemsize: int) -> NDArray[np.int64]:
    """Return the numbers of a `Layout` and of a `_Shape`, and two selection networks: among columns and among rows."""
    among_columns, among_rows = _network(n, cols), _network(n, rows)
    first = len(Layout._fields) + len(_Shape._fields)
    shape = _Shape(n, rows, cols, int(clamp_rows), int(clamp_columns), itemsize, first, first + len(among_columns))
    return np.array([*layout(rows, cols), *shape, *among_columns, *among_rows], np.int64)


def _network(n: int, length: int) -> list[int]:
    """Return how many steps a selection network has, which values are its outputs, and three numbers for each step."""
    network = _networks.selection_network(n, length)
    return [len(network.steps), network.nth, network.following, *(int(x) for step in network.steps for x in step)]


@inner
def call(function, memory, a, b, c, d):
    """Call one of the functions of `Code`."""
    found = carray(pointer(function), (3,), np.int64)
    numbers = carray(pointer(found[1]), (found[2],), np.int64)
    # As integers of one type, or Numba would compile it for every constant that it is called with.
    _run(found[0], numbers, memory.ctypes.data, np.int64(a), np.int64(b), np.int64(c), np.int64(d))


@inner
def _run(which, numbers, memory, a, b, c, d):
    at, shape = layout_in(numbers, 0), _shape_in(numbers, _LAYOUT)
    if which == _STORE_FILLED:
        _store_filled(at, shape, memory, a, c, d)
        return
    for lane in range(LANES):
        if which == _FIND_LOWEST:
            columns, rows = _potentials(at, memory, lane)
            _of_each_lane(memory, at.lowest_column)[lane] = columns[: shape.cols].min()
            _of_each_lane(memory, at.lowest_row)[lane] = rows[: shape.rows].min()
        elif which == _FILL:
            _fill(at, shape, memory, lane)
        elif which in (_LOAD, _LOAD_PERTURBED):
            _load(at, shape, memory, lane, a, b, c, d, which == _LOAD_PERTURBED)
        elif which in (_PROVE, _PROVE_PERTURBED):
            _choose_best(at, shape, numbers, memory, lane)
            _add_potentials(at, shape, memory, lane)
            if which == _PROVE:
                _store_mask(at, shape, memory, lane, a, b, c, d)
            else:
                _store_perturbed(at, shape, memory, lane, a, b, c, d)
        else:
            _move(at, shape, numbers, memory, lane, which == _MOVE_ROWS, a)


_LAYOUT = len(Layout._fields)


@inner
def _shape_in(numbers, start):
    return _Shape(
        numbers[start],
        numbers[start + 1],
        numbers[start + 2],
        numbers[start + 3],
        numbers[start + 4],
        numbers[start + 5],
        numbers[start + 6],
        numbers[start + 7],
    )


@inner
def _of_lanes(memory, start, count):
    """Return vectors (count, lanes) of 16-bit integers."""
    return carray(pointer(memory + start), (count, LANES), np.int16)


@inner
def _potentials(at, memory, lane):
    """Return the potentials of a tile's columns and rows, filled up."""
    columns = carray(pointer(memory + at.columns), (LANES, at.column_width), np.float32)
    rows = carray(pointer(memory + at.rows), (LANES, at.row_width), np.float32)
    return columns[lane], rows[lane]


@inner
def _of_each_lane(memory, start):
    return carray(pointer(memory + start), (LANES,), np.float32)


@inner
def _magnitude(shape, memory, at, lane, address, row_step, i, j):
    """Return an entry's magnitude; a float32 as it is, in a float64."""
    place = carray(pointer(memory + at.weights), (LANES,), np.int64)[lane] + i * row_step + j
    if shape.itemsize == 4:
        return np.float64(abs(carray(pointer(address + 4 * place), (1,), np.float32)[0]))
    return abs(carray(pointer(address + 8 * place), (1,), np.float64)[0])


@inner
def _difference(shape, value, potential):
    """Return a difference, rounded to the dtype of the weights."""
    if shape.itemsize == 4:
        return np.float64(np.float32(value) - potential)
    return value - np.float64(potential)


@inner
def _in_units(shape, value, column, row, scale):
    """Return a magnitude less the potentials of its lines, as a float32 in units of the lanes."""
    return np.float32(_difference(shape, _difference(shape, value, column), row)) * scale


@inner
def _is_multiple(shape, value, quantum):
    """Return whether a magnitude is a multiple of a power of two, less than 2**23 times as large."""
    # Digits after the quantum are lost on the way up. Where that overflows, NaN is equal to nothing.
    if shape.itemsize == 4:
        far = quantum * np.float32(2.0**23)
        return (np.float32(value) + far) - far == np.float32(value)
    far_away = np.float64(quantum) * 2.0**52
    return (value + far_away) - far_away == value


@inner
def _perturbation(at, shape, memory, value, is_multiple, i, j):
    """Return by how much an entry is perturbed, in units."""
    # Lines that may be short need no zeros.
    if not is_multiple or ((shape.clamp_rows or shape.clamp_columns) and not value > 0):
        return np.float32(0)
    return carray(pointer(memory + at.shares), (shape.rows, at.column_width), np.float32)[i, j]


@inner
def _rounded(value):
    """Return the nearest integer of 16 bits; where 32 are too few for it, it is the least, as x86 has it."""
    whole = np.rint(value)
    number = np.int64(whole) if -2147483648.0 <= whole < 2147483648.0 else np.int64(-2147483648)
    return np.int16(max(np.int64(-32768), min(np.int64(32767), number)))


@inner
def _greatest(potentials, word, bits):
    """Return the greatest of potentials, or any that is negative if all are."""
    greatest = np.int32(-2147483648)
    for potential in potentials:
        word[0] = potential
        greatest = max(greatest, bits[0])
    bits[0] = greatest
    return word[0]


@inner
def _load(at, shape, memory, lane, address, row_step, keeps, coarser, perturb):
    top = 0.0
    word = carray(pointer(memory + at.scratch), (1,), np.float32)
    bits = carray(pointer(memory + at.scratch), (1,), np.int32)
    is_finite = True
    zeros = 0
    for i in range(shape.rows):
        for j in range(shape.cols):
            value = _magnitude(shape, memory, at, lane, address, row_step, i, j)
            is_finite &= value < np.inf
            zeros += value == 0
            top = max(top, value)
    if not is_finite:
        largest = np.int64(0x7F800000)
    elif shape.itemsize == 4:
        word[0] = np.float32(top)
        largest = np.int64(bits[0])
    else:
        # The bits of a float32 of the same exponent, or of the nearest that there is.
        carray(pointer(memory + at.scratch), (1,), np.float64)[0] = top
        exponent = carray(pointer(memory + at.scratch), (1,), np.int64)[0] >> 52
        largest = min(max(exponent - (1023 - 127), 0), 254) << 23
    carray(pointer(memory + at.largest), (LANES,), np.int32)[lane] = largest
    exponent = np.int64(largest) >> 23
    exponent = min(max(exponent, np.int64(40)), np.int64(254))
    columns, rows = _potentials(at, memory, lane)
    if perturb:
        carray(pointer(memory + at.zeros), (LANES,), np.int32)[lane] = zeros
        # That of what the potentials take away: entries near it decide, and larger ones may be multiples of more.
        word[0] = _greatest(rows[: shape.rows], word, bits) + _greatest(columns[: shape.cols], word, bits)
        typical = np.int64(bits[0]) >> 23 if word[0] > 0 else np.int64(0)
        least = max(exponent - FARTHEST_BELOW, np.int64(40))
        exponent = min(max(typical, least), exponent)
    exponent -= keeps & (KEEP_COLUMNS - 1)
    bits[0] = (268 - exponent) << 23
    scale = word[0]
    bits[0] = (exponent - 14) << 23
    unit = word[0]
    _of_each_lane(memory, at.scales)[lane] = scale
    _of_each_lane(memory, at.units)[lane] = unit
    quantum = np.float32(0)
    if perturb:
        bits[0] = (exponent - 14 + coarser) << 23
        quantum = word[0]
        _of_each_lane(memory, at.quanta)[lane] = quantum
        # To whole units, which leave differences exact.
        for j in range(at.column_width):
            columns[j] = np.rint(columns[j] * scale) * unit
        for i in range(at.row_width):
            rows[i] = np.rint(rows[i] * scale) * unit
    if keeps & KEEP_COLUMNS == 0:
        columns[:] = 0
    columns[shape.cols :] = np.inf
    if keeps & KEEP_ROWS == 0:
        rows[:] = unit * np.float32(HALF)
    entries = _of_lanes(memory, at.entries, shape.rows * shape.cols)
    for i in range(shape.rows):
        for j in range(shape.cols):
            value = _magnitude(shape, memory, at, lane, address, row_step, i, j)
            rest = _in_units(shape, value, columns[j], rows[i], scale)
            if perturb:
                is_multiple = _is_multiple(shape, value, quantum)
                rest += _perturbation(at, shape, memory, value, is_multiple, i, j)
            entries[i * shape.cols + j, lane] = _rounded(rest)
    _of_lanes(memory, at.u, at.row_width)[:, lane] = 0
    _of_lanes(memory, at.v, at.column_width)[:, lane] = 0
    zero = np.float32(0)
    if shape.clamp_rows:
        for i in range(shape.rows):
            _of_lanes(memory, at.floor_u, at.row_width)[i, lane] = _rounded((zero - rows[i]) * scale)
    if shape.clamp_columns:
        for j in range(shape.cols):
            _of_lanes(memory, at.floor_v, at.column_width)[j, lane] = _rounded((zero - columns[j]) * scale)


@inner
def _saturated(number):
    return np.int16(max(np.int64(-32768), min(np.int64(32767), number)))


@inner
def _best_two(at, shape, numbers, memory, lane, line, along_rows):
    """Return the n-th and the (n+1)-th largest entry of a line, less the potentials of the lines across."""
    count = shape.cols if along_rows else shape.rows
    network = shape.row_network if along_rows else shape.column_network
    steps = numbers[network]
    wires = np.empty(count + steps, np.int16)
    entries = _of_lanes(memory, at.entries, shape.rows * shape.cols)
    across = _of_lanes(memory, at.v if along_rows else at.u, count)
    for k in range(count):
        entry = entries[line * shape.cols + k if along_rows else k * shape.cols + line, lane]
        wires[k] = _saturated(np.int64(entry) - np.int64(across[k, lane]))
    for step in range(steps):
        start = network + 3 + 3 * step
        wires[count + step] = pick(numbers[start] != 0, wires[numbers[start + 1]], wires[numbers[start + 2]])
    return np.int64(wires[numbers[network + 1]]), np.int64(wires[numbers[network + 2]])


@inner
def _move(at, shape, numbers, memory, lane, along_rows, share):
    count = shape.rows if along_rows else shape.cols
    potentials = _of_lanes(memory, at.u if along_rows else at.v, count)
    floors = _of_lanes(memory, at.floor_u if along_rows else at.floor_v, count)
    for line in range(count):
        nth, following = _best_two(at, shape, numbers, memory, lane, line, along_rows)
        middle = (nth + following) >> 1
        way = np.int64(_saturated(middle - np.int64(potentials[line, lane])))
        rounded = (np.int64(_saturated(way + way)) * share) >> 16
        new = _saturated(middle + rounded)
        if shape.clamp_rows if along_rows else shape.clamp_columns:
            new = max(new, floors[line, lane])
        potentials[line, lane] = new


@inner
def _choose_best(at, shape, numbers, memory, lane):
    best = _of_lanes(memory, at.best, 2 * at.row_width)
    for i in range(shape.rows):
        nth, following = _best_two(at, shape, numbers, memory, lane, i, True)
        best[i, lane] = nth
        best[at.row_width + i, lane] = following


@inner
def _add_potentials(at, shape, memory, lane):
    columns, rows = _potentials(at, memory, lane)
    unit = _of_each_lane(memory, at.units)[lane]
    v = _of_lanes(memory, at.v, at.column_width)
    best = _of_lanes(memory, at.best, 2 * at.row_width)
    half = unit * np.float32(0.5)
    for j in range(at.column_width):
        columns[j] = _clamped(columns[j] + np.float32(v[j, lane]) * unit, unit, shape.clamp_columns)
    for i in range(shape.rows):
        both = np.float32(np.int64(best[i, lane]) + np.int64(best[at.row_width + i, lane]))
        rows[i] = _clamped(rows[i] + both * half, unit, shape.clamp_rows)


@inner
def _clamped(new, unit, clamp):
    # Less than a unit is as good as nothing, and lets a line be short.
    return np.float32(0) if clamp and new < unit else new


@inner
def _is_wrong(count, full, potential, clamp):
    if clamp:
        return count > full or (count != full and potential != 0)
    return count != full


@inner
def _words(memory, start, count):
    return carray(pointer(memory + start), (count, LANES), np.int64)


@inner
def _keep_bits(at, shape, memory, lane, i, j, keep, is_zero):
    """Add an entry to what is known of a row, for zeros to fill it up."""
    if shape.clamp_rows and shape.clamp_columns:
        bits, zero_bits = _words(memory, at.bits, shape.rows), _words(memory, at.zero_bits, shape.rows)
        if j == 0:
            bits[i, lane] = 0
            zero_bits[i, lane] = 0
        bits[i, lane] |= np.int64(keep) << j
        zero_bits[i, lane] |= np.int64(is_zero) << j


@inner
def _fill(at, shape, memory, lane):
    bits, zero_bits = _words(memory, at.bits, shape.rows), _words(memory, at.zero_bits, shape.rows)
    room = carray(pointer(memory + at.scratch), (shape.cols,), np.int64)
    room[:] = shape.n
    for i in range(shape.rows):
        for j in range(shape.cols):
            room[j] -= (bits[i, lane] >> j) & 1
    for i in range(shape.rows):
        missing = _missing(shape, bits[i, lane])
        for most in range(shape.n, 0, -1):
            for j in range(shape.cols):
                if missing > 0 and room[j] == most and ((zero_bits[i, lane] & ~bits[i, lane]) >> j) & 1:
                    bits[i, lane] |= np.int64(1) << j
                    room[j] -= 1
                    missing -= 1
    with_room = np.int64(0)
    for j in range(shape.cols):
        with_room |= np.int64(room[j] > 0) << j
    short = np.int64(0)
    for i in range(shape.rows):
        missing = _missing(shape, bits[i, lane])
        for k in range(shape.rows):
            given = bits[k, lane] & zero_bits[k, lane] & zero_bits[i, lane] & ~bits[i, lane]
            taken = zero_bits[k, lane] & ~bits[k, lane] & with_room
            if missing > 0 and given != 0 and taken != 0:
                bits[k, lane] ^= (given & -given) | (taken & -taken)
                bits[i, lane] |= given & -given
                with_room ^= taken & -taken
                missing -= 1
        short |= missing
    _words(memory, at.short, 1)[0, lane] = short


@inner
def _missing(shape, row):
    missing = shape.n
    for j in range(shape.cols):
        missing -= (row >> j) & 1
    return missing


@inner
def _store_filled(at, shape, memory, lane, mask_step, masks):
    mask = masks + carray(pointer(memory + at.masks), (LANES,), np.int64)[lane]
    bits = _words(memory, at.bits, shape.rows)
    for i in range(shape.rows):
        chosen = carray(pointer(mask + i * mask_step), (shape.cols,), np.uint8)
        for j in range(shape.cols):
            chosen[j] = (bits[i, lane] >> j) & 1


@inner
def _store_mask(at, shape, memory, lane, address, row_step, mask_step, masks):
    columns, rows = _potentials(at, memory, lane)
    mask = masks + carray(pointer(memory + at.masks), (LANES,), np.int64)[lane]
    counts = carray(pointer(memory + at.scratch), (shape.cols,), np.int64)
    counts[:] = 0
    proven = True
    for i in range(shape.rows):
        chosen = carray(pointer(mask + i * mask_step), (shape.cols,), np.uint8)
        count = 0
        for j in range(shape.cols):
            value = _magnitude(shape, memory, at, lane, address, row_step, i, j)
            keep = _difference(shape, value, columns[j]) > rows[i]
            chosen[j] = keep
            count += keep
            counts[j] += keep
            _keep_bits(at, shape, memory, lane, i, j, keep, value == 0)
        proven &= not _is_wrong(count, shape.n, rows[i], shape.clamp_rows)
    for j in range(shape.cols):
        proven &= not _is_wrong(counts[j], shape.n, columns[j], shape.clamp_columns)
    carray(pointer(memory + at.proven), (LANES,), np.int32)[lane] = proven


@inner
def _store_perturbed(at, shape, memory, lane, address, row_step, mask_step, masks):
    columns, rows = _potentials(at, memory, lane)
    scale, quantum = _of_each_lane(memory, at.scales)[lane], _of_each_lane(memory, at.quanta)[lane]
    mask = masks + carray(pointer(memory + at.masks), (LANES,), np.int64)[lane]
    counts = carray(pointer(memory + at.scratch), (shape.cols,), np.int64)
    counts[:] = 0
    proven = True
    lacking, clear = np.float32(0), np.float32(np.inf)
    farthest = _of_each_lane(memory, at.units)[lane] * np.float32(FARTHEST)
    for i in range(shape.rows):
        chosen = carray(pointer(mask + i * mask_step), (shape.cols,), np.uint8)
        count = 0
        for j in range(shape.cols):
            value = _magnitude(shape, memory, at, lane, address, row_step, i, j)
            is_multiple = _is_multiple(shape, value, quantum)
            rest = _in_units(shape, value, columns[j], rows[i], scale)
            keep = rest + _perturbation(at, shape, memory, value, is_multiple, i, j) > 0
            right = rest if keep else -rest
            if right < 0:
                lacking -= right
            if not is_multiple:
                clear = min(clear, right)
            chosen[j] = keep
            count += keep
            counts[j] += keep
            _keep_bits(at, shape, memory, lane, i, j, keep, value == 0)
        proven &= not _is_wrong(count, shape.n, rows[i], shape.clamp_rows)
        proven &= abs(rows[i]) <= farthest
    for j in range(shape.cols):
        proven &= not _is_wrong(counts[j], shape.n, columns[j], shape.clamp_columns)
        proven &= abs(columns[j]) <= farthest
    # (c) of the proof.
    proven &= bool(lacking < quantum * scale)
    proven &= bool(clear > lacking + np.float32(1))
    carray(pointer(memory + at.proven), (LANES,), np.int32)[lane] = proven
