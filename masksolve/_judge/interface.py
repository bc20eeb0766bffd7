"""The judge's functions for one tile: how they are called, and what they return. `inner_loops` has them.

Each takes (program, weights, weights_row, mask, mask_row, potentials, rows, reading, out) and returns bits. Weights,
mask, potentials and `out` are addresses; `weights_row` and `mask_row` are bytes from one row of the tile to the next;
the entries of a row lie one after the other. `reading` is n, with some of the bits below.

prove
    Whether the column potentials prove the mask to be optimal, by strict order in the dtype of the weights. Writes all
    importance and what is kept of it, sums of float64, to out[TOTAL] and out[KEPT].
weigh
    By how much potentials and the middles of rows are wrong for the mask, in float64: writes the rest of `out`. For
    masks that are `FILLED` and not `OVERFULL`, finite weights, and 0 < n < columns.
differ
    Whether two masks differ; the second stands where the weights do.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from masksolve._machine_code import VECTOR_BYTES, pointer_to
from masksolve._translated import inner, intrinsic

# In the reading: which lines hold exactly n, and whether entries of weight zero count as not kept.
EXACT_ROWS, EXACT_COLUMNS, WITHOUT_ZEROS = 1 << 16, 1 << 17, 1 << 18

# What `prove` returns: the mask is proven to be optimal; lines hold exactly n where they must; a line holds more; a
# weight is not finite; one is zero.
PROVEN, FILLED, OVERFULL, NOT_FINITE, HAS_ZEROS = 1, 2, 4, 8, 16

# What `weigh` returns: no reduced cost was rounded; no potential is negative of a column that may hold fewer than n.
UNROUNDED, NOT_NEGATIVE = 1, 2

# Of `out`: where `prove` writes, and where `weigh` does: by how much entries and lines are wrong, altogether; the
# least that any entry other than zero has of the larger of two: half of how far it lies on the right side of its row's
# middle, and the largest power of two that divides it; the largest weight; the largest abs(potential).
TOTAL, KEPT, WRONG, CLEARANCE, LARGEST, FARTHEST = range(6)
OUTPUTS = 6

# Wider or higher tiles are judged in integers: machine code counts in bytes.
LARGEST_TILE = 128


def group_of(rows: int, columns: int, itemsize: int) -> int:
    """Return how many rows are taken at once: as many as a vector holds, if they divide the rows of a tile."""
    width, group = 1 << (columns - 1).bit_length(), 1
    while 2 * group * width * itemsize <= VECTOR_BYTES and rows % (2 * group) == 0:
        group *= 2
    return group


class Program(NamedTuple):
    """The functions' parameters: their addresses, if they are machine code, and the tiles that they are for.

    They are for tiles of `columns`, of weights of `itemsize`, and take `group` rows at once, a power of two that
    divides all rows.
    """

    prove: int
    weigh: int
    differ: int
    columns: int
    itemsize: int
    group: int


@inner
def unpack(program: tuple[int, ...]) -> Program:
    """Return the program in the plain tuple that kernels are given: Numba takes longer over the type of a named one."""
    # A kernel here, so that those on the disk are known to depend on the constants above.
    return Program(program[0], program[1], program[2], program[3], program[4], program[5])


@intrinsic
def write(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write a number, or a bool as a byte, to an address."""
    if value.type == ir.IntType(1):
        value = builder.zext(value, ir.IntType(8))
    builder.store(value, builder.inttoptr(address, pointer_to(value.type)))
