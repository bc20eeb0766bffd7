"""Tiles in the lanes of vectors: how they get in and out, and what is known of them there."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._jit import inner_kernel
from masksolve._methods.exact.fill_zeros import fill_with_zeros
from masksolve._methods.exact.inner_loops import call
from masksolve._methods.exact.layout import LARGEST, LEAST, LOWEST, OFFSETS, SHORT, STRICT, WRONG, ZEROS, Layout

# What is to become of a tile: it is to be equilibrated as "exactly n" or as "at most n", in the dtype of the weights or
# in float64, perturbed; or it is to be solved by other means.
AS_EXACTLY, AS_AT_MOST, TIES_EXACTLY, TIES_AT_MOST, UNSOLVED = 0, 1, 2, 3, 4

# So many tiles fit into a group or two: none of them is left to a later pass for being slow.
FEW = 32
# In haste, a group of lanes goes on until no more than this share of it is uncertain.
SLOW = 0.25
# Share of zeros from which on a tile is first solved as "at most n".
_FULL_OF_ZEROS = 0.25


class Task(NamedTuple):
    """What a pass is given and does not change, but for the potentials found; see `equilibrate_strict`."""

    at: Layout
    n: int
    m: int
    grid: tuple[int, ...]
    potentials: NDArray[Any]
    at_most: bool


class Tiles(NamedTuple):
    """Tiles to be solved: where they are, column potentials to start from, and what is to become of each."""

    where: NDArray[Any]
    potentials: NDArray[Any]
    stages: NDArray[Any]


@inner_kernel
def take(stage, left, count, some, some_potentials):
    """Move tiles that wait for a stage from a list to another; close up the others. Return how many are moved."""
    taken = 0
    for k in range(count):
        if left.stages[k] == stage:
            some[taken] = left.where[k]
            for j in range(left.potentials.shape[1]):
                some_potentials[taken, j] = left.potentials[k, j]
            taken += 1
        else:
            left.where[k - taken] = left.where[k]
            for j in range(left.potentials.shape[1]):
                left.potentials[k - taken, j] = left.potentials[k, j]
            left.stages[k - taken] = left.stages[k]
    return taken


@inner_kernel
def load(code, task, vectors, tiles, start, first, in_group, warm):
    """Load a group of tiles, the last of them also into lanes that would be empty, and the potentials to start from."""
    at, work = task.at, vectors.numbers
    for lane in range(at.lanes):
        given = first + min(lane, in_group - 1)
        vectors.words[OFFSETS * at.words + lane] = _place(tiles[given], task.grid[1], task.grid[2])
        if warm:
            for j in range(task.m):
                work[(at.v + j) * at.lanes + lane] = start[given, j]
    call(code.load, vectors, task.grid[0], task.grid[3], 0, 0.0)
    for k in range(at.u * at.lanes, (at.v if warm else at.best) * at.lanes):
        work[k] = 0


@inner_kernel
def clamp_potentials(task, vectors):
    for k in range(task.at.v * task.at.lanes, task.at.best * task.at.lanes):
        if vectors.numbers[k] < 0:
            vectors.numbers[k] = 0


@inner_kernel
def solve_constant(code, task, vectors, tiles, first, waiting):
    """Solve tiles whose entries are all the same, for which any mask will do; return the lanes that still wait."""
    at = task.at
    for lane in range(at.lanes):
        largest = vectors.integers[LARGEST * at.lanes + lane]
        is_constant = largest == vectors.integers[LEAST * at.lanes + lane] and largest < infinity(vectors)
        if is_constant and (waiting >> lane) & 1:
            row = (np.int64(1) << task.n) - 1
            for i in range(task.m):
                vectors.words[at.bits * at.words + i * at.lanes + lane] = row
                # Each row is the one before, turned round by one; bits from m on are not looked at.
                row = (row << 1) | ((row >> (task.m - 1)) & 1)
                # Potentials of zero prove every such mask.
                vectors.numbers[(at.v + i) * at.lanes + lane] = 0
            _store(code, task, vectors, tiles[first + lane], lane, 0.0)
            waiting &= ~(1 << lane)
    return waiting


@inner_kernel
def store_proven(code, task, vectors, tiles, first, proven, clamp, least, rounding):
    """Store the masks of lanes whose potentials prove them, if they also do as "at most n", or can be filled up.

    `least` is the vector of what takes the place of the least row potential, which may be off by `rounding` times the
    largest weight. Return the lanes whose masks do not do.
    """
    at, work = task.at, vectors.numbers
    failed = 0
    for lane in range(at.lanes):
        if not (proven >> lane) & 1:
            continue
        passes, lowest = True, 0.0
        if task.at_most and not clamp:
            lowest = work[LOWEST * at.lanes + lane]
            passes = work[least * at.lanes + lane] + lowest > rounding * work[LARGEST * at.lanes + lane]
        elif clamp and not task.at_most:
            passes = vectors.integers[SHORT * at.lanes + lane] == 0 or fill_with_zeros(
                vectors.words,
                at.bits * at.words + lane,
                at.zero_bits * at.words + lane,
                at.lanes,
                at.scratch * at.words,
                task.n,
                task.m,
            )
        if passes:
            _store(code, task, vectors, tiles[first + lane], lane, lowest)
        else:
            failed |= 1 << lane
    return failed


@inner_kernel
def _store(code, task, vectors, tile, lane, lowest):
    """Store the mask of a lane, and its column potentials less `lowest`."""
    at, grid = task.at, task.grid
    call(code.store, vectors, grid[4] + _place(tile, grid[5], grid[6]), grid[7], lane, 0.0)
    if len(task.potentials) > 0:
        where = _place(tile, grid[8], 1)
        for j in range(task.m):
            task.potentials[where, j] = vectors.numbers[(at.v + j) * at.lanes + lane] - lowest


@inner_kernel
def leave(task, vectors, lane, tile, stage, shift, left, count):
    """Add the tile of a lane to those left, its column potentials less `shift`; return how many there are now."""
    at = task.at
    left.where[count] = tile
    left.stages[count] = stage
    for j in range(task.m):
        left.potentials[count, j] = vectors.numbers[(at.v + j) * at.lanes + lane] - shift
    return count + 1


@inner_kernel
def shift_to_at_most(task, vectors, lane, least):
    """What, taken off the column potentials, splits what is lacking for "at most n" evenly between rows and columns."""
    at, work = task.at, vectors.numbers
    return 0.5 * (work[LOWEST * at.lanes + lane] - work[least * at.lanes + lane])


@inner_kernel
def _place(tile, down, across):
    return (tile >> 32) * down + (tile & 0xFFFFFFFF) * across


@inner_kernel
def count_bits(word):
    count = 0
    while word != 0:
        count += 1
        word &= word - 1
    return count


@inner_kernel
def strict_lanes(task, vectors, lanes):
    """Those of some lanes whose choice is strictly best in every row, and puts n in every column."""
    at, strict = task.at, 0
    for lane in range(at.lanes):
        if vectors.integers[STRICT * at.lanes + lane] != 0:
            strict |= 1 << lane
    return strict & lanes


@inner_kernel
def proven_lanes(task, vectors, lanes):
    """Those of some lanes whose choice is proven to be the only optimum."""
    at, proven = task.at, 0
    for lane in range(at.lanes):
        if vectors.integers[STRICT * at.lanes + lane] != 0 and vectors.numbers[WRONG * at.lanes + lane] == 0:
            proven |= 1 << lane
    return proven & lanes


@inner_kernel
def is_full_of_zeros(task, vectors, lane):
    return vectors.numbers[ZEROS * task.at.lanes + lane] >= _FULL_OF_ZEROS * task.m * task.m


@inner_kernel
def infinity(vectors):
    """The bits of infinity, as an integer."""
    return 0x7F800000 if vectors.numbers.itemsize == 4 else 0x7FF0000000000000
