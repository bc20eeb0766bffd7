"""The memory of a group of tiles in 16-bit lanes, and the functions that work on it."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from masksolve._machine_code import VECTOR_BYTES, pointer_to
from masksolve._translated import inner, intrinsic

LANES = VECTOR_BYTES // 2
# A tile's largest magnitude is rounded to less than 2**15; half of that is taken from all, so that what potentials take
# from them fits 16 bits.
HALF = 1 << 14
# What `Code.load` takes as c: how many bits finer than that weights are to be, and whether the potentials of columns
# and of rows stand in `columns` and `rows`, or are to be set to 0 and to the middle of all weights.
KEEP_COLUMNS, KEEP_ROWS = 1 << 8, 1 << 9
# Potentials of perturbed tiles lie within this many units, or nothing is proven: differences are exact.
FARTHEST = 1 << 23
# Their units are chosen by what potentials take away, or this many bits below the largest magnitude.
FARTHEST_BELOW = 9


class Layout(NamedTuple):
    """The memory of a group of r x c tiles: where each part begins, in bytes.

    weights, masks
        int64 (lanes): the place of each tile, in elements, and of its mask, in bytes.
    largest
        int32 (lanes): the bits of its largest magnitude, as a float32.
    units, scales
        float32 (lanes): the weight that is 1 in the lanes, and its inverse; powers of two.
    quanta
        float32 (lanes): of what weights have to be multiples to be perturbed; powers of two.
    zeros
        int32 (lanes): how many entries are zero.
    proven
        int32 (lanes): 1 where the mask that is stored is proven, 0 elsewhere.
    lowest_column, lowest_row
        float32 (lanes): the least of its columns' potentials, and of its rows'.
    shares
        float32 (rows, column_width): by how much each entry is perturbed, in units of the weights.
    columns, rows
        float32 (lanes, column_width), (lanes, row_width): potentials in units of the weights. Those of columns that
        there are not are infinite, so that these are never chosen.
    bits, zero_bits, room, short
        Where lines may be short, int64 (rows, lanes): the entries that each row of a mask keeps, and those that are
        zero. (cols, lanes): the columns with room for one more, for two, and so on. (lanes): not 0 where rows have
        remained short.
    scratch
        What else is needed tile by tile.
    u, v, floor_u, floor_v, best, entries
        int16, a vector each: what potentials of rows and of columns take beyond those above, and have to take at
        least; the n-th best and the following reduced entry of each row, one after the other; the entries less the
        potentials above.
    size
        Bytes in all.
    column_width, row_width
        The columns and the rows, filled up to a power of two, and to a multiple of 8.
    """

    weights: int
    masks: int
    largest: int
    units: int
    scales: int
    quanta: int
    zeros: int
    proven: int
    lowest_column: int
    lowest_row: int
    shares: int
    columns: int
    rows: int
    bits: int
    zero_bits: int
    room: int
    short: int
    scratch: int
    u: int
    v: int
    floor_u: int
    floor_v: int
    best: int
    entries: int
    size: int
    column_width: int
    row_width: int


@cache
def layout(rows: int, cols: int) -> Layout:
    """Return the layout for tiles of this shape."""
    column_width, row_width = max(8, 1 << (cols - 1).bit_length()), -(-rows // 8) * 8
    vector = 2 * LANES
    scratch = max(
        # 32 bytes of maxima, and of counts
        64 * LANES,
        # potentials and the two best of each row, tile by tile
        2 * LANES * (column_width + 2 * row_width),
        # a byte and two float32 for each column, and a word
        (9 * column_width + 8) * LANES,
    )
    sizes = (
        *[8 * LANES] * 2,
        *[4 * LANES] * 8,
        *(4 * rows * column_width, 4 * LANES * column_width, 4 * LANES * row_width),
        *(8 * LANES * rows, 8 * LANES * rows, 8 * LANES * cols, 8 * LANES, scratch),
        *(vector * row_width, vector * column_width, vector * row_width, vector * column_width, vector * 2 * row_width),
        vector * rows * cols,
    )
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // VECTOR_BYTES) * VECTOR_BYTES)
    return Layout(*[*starts, column_width, row_width])


class Code(NamedTuple):
    """The functions for one shape and its margins, by address, and what each takes as a, b, c and d.

    load
        a: address of the weights, b: elements from one row of a tile to the next, c: see `KEEP_COLUMNS`. Fills
        `largest` to `scales`, the entries and the floors, and sets u and v to 0.
    move_rows, move_columns
        a: how far each potential moves beyond the middle between the n-th and the (n+1)-th largest reduced entry of
        its line, in units of the way times 2**-15: less than the way.
    prove
        a, b: as for `load`, c: bytes from row to row of a mask, d: address of the masks. Fills `columns`, `rows` and
        `proven`, and stores masks.
    load_perturbed, prove_perturbed
        The same for tiles that tie ("Ties" in docs/proof.md): entries that are multiples of 2**d units are perturbed by
        `shares`. `load_perturbed` takes d too, and fills `quanta` and `zeros`.
    find_lowest
        Fills `lowest_column` and `lowest_row`.
    fill
        Fills masks up with zeros, row after row, from columns with the most room on: `bits`, `room` and `short`.
    store_filled
        a: lane, c, d: as for `prove`. Stores the mask that `bits` hold.
    """

    load: int
    move_rows: int
    move_columns: int
    prove: int
    load_perturbed: int
    prove_perturbed: int
    find_lowest: int
    fill: int
    store_filled: int


_I32, _I64 = ir.IntType(32), ir.IntType(64)


# As vector code, which LLVM makes of loops too, in half a second for a kernel.
@intrinsic
def fill_lanes(builder: ir.IRBuilder, address: ir.Value, first: ir.Value, step: ir.Value) -> None:
    """Fill int64 (lanes) with first, first + step, and so on."""
    numbers = ir.VectorType(_I64, LANES)
    undefined, everywhere = ir.Constant(numbers, ir.Undefined), ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    firsts, steps = (
        builder.shuffle_vector(builder.insert_element(undefined, each, _I32(0)), undefined, everywhere)
        for each in (first, step)
    )
    values = builder.add(firsts, builder.mul(steps, ir.Constant(numbers, list(range(LANES)))))
    builder.store(values, builder.inttoptr(address, pointer_to(numbers)), align=8)


@intrinsic
def count_at_least(builder: ir.IRBuilder, address: ir.Value, least: ir.Value) -> ir.Value:
    """Return how many of int32 (lanes) are at least a number of 32 bits."""
    numbers, bits = ir.VectorType(_I32, LANES), ir.IntType(LANES)
    values = builder.load(builder.inttoptr(address, pointer_to(numbers)), align=4, typ=numbers)
    one = builder.insert_element(ir.Constant(numbers, ir.Undefined), builder.trunc(least, _I32), _I32(0))
    leasts = builder.shuffle_vector(one, one, ir.Constant(numbers, [0] * LANES))
    found = builder.bitcast(builder.icmp_signed(">=", values, leasts), bits)
    return builder.zext(builder.call(builder.module.declare_intrinsic("llvm.ctpop", [bits]), [found]), _I64)


@inner
def unpack(program: NDArray[np.int64]) -> tuple[Code, Layout]:
    """Return the code and the layout of a program."""
    return (
        Code(
            program[0],
            program[1],
            program[2],
            program[3],
            program[4],
            program[5],
            program[6],
            program[7],
            program[8],
        ),
        layout_in(program, 9),
    )


@inner
def layout_in(program: NDArray[np.int64], start: int) -> Layout:
    """Return the layout that stands in a program from `start` on."""
    return Layout(
        program[start],
        program[start + 1],
        program[start + 2],
        program[start + 3],
        program[start + 4],
        program[start + 5],
        program[start + 6],
        program[start + 7],
        program[start + 8],
        program[start + 9],
        program[start + 10],
        program[start + 11],
        program[start + 12],
        program[start + 13],
        program[start + 14],
        program[start + 15],
        program[start + 16],
        program[start + 17],
        program[start + 18],
        program[start + 19],
        program[start + 20],
        program[start + 21],
        program[start + 22],
        program[start + 23],
        program[start + 24],
        program[start + 25],
        program[start + 26],
    )


def new_program(addresses: list[int], rows: int, cols: int) -> NDArray[np.int64]:
    """Return, for `unpack`, the addresses of all functions of `Code` and the layout."""
    return np.array([*addresses, *layout(rows, cols)], np.int64)


def new_memory(rows: int, cols: int) -> NDArray[np.int8]:
    """Return memory for a group of tiles, from a multiple of the vectors' size on."""
    size = layout(rows, cols).size
    memory = np.zeros(size + VECTOR_BYTES, np.int8)
    first = -memory.ctypes.data % VECTOR_BYTES
    return memory[first : first + size]
