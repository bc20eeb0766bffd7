"""The vectors of a group of tiles in memory, one tile in each lane, and the functions that work on them.

All vectors of a group of tiles lie in one block of memory, as `Layout` says. Integers as wide as the numbers, and
words of 64 bits for each lane (two vectors where numbers have 32 bits), lie there bit for bit; `Vectors` are the three
views of the block.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._machine_code import VECTOR_BYTES
from masksolve._translated import inner

# The vectors that come first, whatever the size of tiles: one number or integer per lane.
#
# STRICT, STRICT_ROWS: integers: not 0 where the choice is strictly best in every row and puts n in every column; and
#     where it is strictly best in every row.
# LARGEST, LEAST: integers: the largest and the least bit pattern of an entry, which for floats that are not negative
#     grow with the value, infinity and NaN last.
# SHORT: integers: not 0 where a row that was to be filled holds fewer than n.
# WORST, LOWEST: the least n-th best of all rows, and the least column potential.
# ZEROS, QUANTUM, SMALLEST: how many entries are 0; the largest power of two that divides them all; the smallest other
#     than 0.
# NONZERO, ZERO, LESS_NONZERO, LESS_ZERO: how far entries that are not zero, or are, are perturbed, and what is to be
#     added to that.
# WRONG, CLEARANCE, THRESHOLD: of the choice, judged without the perturbation: by how much entries lie on the wrong
#     side of the middle of their row, altogether; how far the others lie on the right side, at least; the least middle.
# OFFSETS: words: where the lane's tile is.
STRICT, STRICT_ROWS, LARGEST, LEAST, SHORT, WORST, LOWEST, ZEROS, QUANTUM, SMALLEST = range(10)
NONZERO, ZERO, LESS_NONZERO, LESS_ZERO, WRONG, CLEARANCE, THRESHOLD, OFFSETS = range(10, 18)
# Words of all lanes take up to two vectors. Then come the entries of a tile, row by row.
ENTRIES = OFFSETS + 2
# Entries of a line whose bits a word holds.
WORD_BITS = 64


class Layout(NamedTuple):
    """The vector numbers of what lies in the block, after those that come first and the entries.

    u, v
        Potentials of the rows and of the columns.
    best
        Two per row: its n-th best reduced entry, and the middle between that and the (n+1)-th.
    counts
        Integers, one per column: how often it is chosen.
    bits, zero_bits
        Words, `row_words` for each row: the choice, and the zeros.
    scratch
        Room for 4 m words and 2 `row_words`, and for m + 2 numbers.
    size, lanes, words, row_words
        Vectors in all; numbers, and words, in a vector; words that hold the bits of a row.
    pitch
        Vectors from one row of entries to the next.
    """

    u: int
    v: int
    best: int
    counts: int
    bits: int
    zero_bits: int
    scratch: int
    size: int
    lanes: int
    words: int
    row_words: int
    pitch: int


@cache
def layout(m: int, itemsize: int) -> Layout:
    """Return the layout for m x m tiles of numbers of 4 or 8 bytes."""
    row_words = -(-m // WORD_BITS)
    bits = m * row_words * 8 // itemsize
    # A column whose entries lie a power of two apart finds room in a few places of the cache only.
    pitch = m if m <= 64 or m % 2 else m + 1
    starts = [ENTRIES + m * pitch]
    for size in (m, m, 2 * m, m, bits, bits, m + 2):
        starts.append(starts[-1] + size)
    return Layout(*[*starts, VECTOR_BYTES // itemsize, VECTOR_BYTES // 8, row_words, pitch])


class Code(NamedTuple):
    """The functions for one pattern, by the addresses that `call` knows them by, and what each takes as a, b, c and x.

    Clamped ones are for lines that may hold fewer than n: their potentials stay at 0 or above.

    load
        a: address of the weights, b: elements from one row of a tile to the next. Fills the entries with abs(weights).
    move_rows, move_columns
        c: how many rows or columns there are, x: how far the potential of each moves towards the middle between the
        n-th and the (n+1)-th largest reduced entry, in units of the way.
    choose
        c: how many rows there are. The n best entries of every row; clamped, only those above 0. Then as `judge`.
    judge
        Whether each column holds n of the choice; clamped, it may hold fewer, and what the potentials miss by that is
        WRONG. Fills LOWEST. To be called after `choose` where rows and columns are not clamped alike.
    fill
        c: how many rows there are. Adds zeros to the choice in rows and columns that hold fewer than n, as long as both
        have room.
    find_zeros, measure
        Fill ZEROS and the `zero_bits`; QUANTUM and SMALLEST.
    perturb
        Adds shares (a: their address) times b, a vector, to entries up to ZERO, and times c, a vector, to those
        above.
    weigh
        a: the address of the shares, c: how many rows there are. Fills CLEARANCE and THRESHOLD, and adds to WRONG.
    store
        a: address of a tile's mask, b: bytes from row to row, c: the lane. Writes the chosen bits as bytes, 0 or 1.
    """

    load: int
    move_rows: int
    move_columns: int
    choose: int
    judge: int
    fill: int
    find_zeros: int
    measure: int
    perturb: int
    weigh: int
    store: int


def new_program(addresses: list[int], n: int, m: int, itemsize: int) -> NDArray[np.int64]:
    """Return, for `unpack`, the addresses of all functions of `Code` without and with clamp, the layout, n and m."""
    # An array, since Numba takes longer to look at the 32 numbers of a tuple than to solve a tile.
    return np.array([*addresses, *layout(m, itemsize), n, m], np.int64)


def clamped_on_one_side(program: NDArray[np.int64], rows: bool) -> NDArray[np.int64]:
    """Return a program whose code without clamp clamps rows, or else columns: for tiles of which these may be short."""
    changed = program.copy()
    for name in ("move_rows", "choose", "weigh") if rows else ("move_columns", "judge"):
        function = Code._fields.index(name)
        changed[function] = program[_CODE + function]
    return changed


@inner
def unpack(program: NDArray[np.int64]) -> tuple[Code, Code, Layout, int, int]:
    """Return the code without and with clamp, the layout, n and m of a `new_program`."""
    return _code_in(program, 0), _code_in(program, _CODE), layout_in(program, 2 * _CODE), program[-2], program[-1]


_CODE = len(Code._fields)


@inner
def _code_in(program: NDArray[np.int64], start: int) -> Code:
    return Code(
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
    )


class Vectors(NamedTuple):
    """The vectors of a group of tiles, as the numbers, the integers and the words that lie in them.

    numbers, integers
        (vectors, lanes).
    words
        One after the other: `word` says where.
    """

    numbers: NDArray[Any]
    integers: NDArray[Any]
    words: NDArray[np.int64]


@inner
def word(at: Layout, vector: int, line: int, lane: int) -> int:
    """Return the index of a lane's word for a line, among those whose vectors begin at `vector`."""
    # Words of all lanes are one vector or two, so that they have no index by vector and lane.
    return vector * at.words + line * at.lanes + lane


def new_vectors(m: int, itemsize: int) -> Vectors:
    """Return zeros for all vectors of a `Layout`."""
    return vectors_in(new_memory(m, itemsize), m, itemsize)


def new_memory(m: int, itemsize: int) -> NDArray[np.int8]:
    """Return zeros for the memory of all vectors of a `Layout`."""
    size = _size_of(m, itemsize)
    # NumPy's memory begins at a multiple of 16 bytes. A vector of 64 that is not at a multiple of 64 lies in two lines
    # of the cache, and takes two accesses.
    memory = np.zeros(size + VECTOR_BYTES, np.int8)
    first = -memory.ctypes.data % VECTOR_BYTES
    return memory[first : first + size]


def is_large_enough(memory: NDArray[np.int8], m: int, itemsize: int) -> bool:
    """Return whether memory holds all vectors of a `Layout`."""
    return memory.nbytes >= _size_of(m, itemsize)


def vectors_in(memory: NDArray[np.int8], m: int, itemsize: int) -> Vectors:
    """Return the vectors of a `Layout` in memory that is large enough."""
    block = memory[: _size_of(m, itemsize)].reshape(-1, VECTOR_BYTES)
    return Vectors(block.view(f"f{itemsize}"), block.view(f"i{itemsize}"), block.reshape(-1).view(np.int64))


def _size_of(m: int, itemsize: int) -> int:
    return layout(m, itemsize).size * VECTOR_BYTES
