"""Load tiles into the lanes of vectors, store their masks, and query what is known of each lane."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._jit import inner_kernel
from masksolve._methods.exact.fill_zeros import fill_with_zeros
from masksolve._methods.exact.inner_loops import call
from masksolve._methods.exact.layout import LARGEST, LEAST, LOWEST, OFFSETS, SHORT, STRICT, WRONG, ZEROS, Layout, word

# What is to become of a tile: it is to be equilibrated as "exactly n" or as "at most n", in the dtype of the weights or
# in float64, perturbed; or it is to be solved by other means.
AS_EXACTLY, AS_AT_MOST, TIES_EXACTLY, TIES_AT_MOST, UNSOLVED = 0, 1, 2, 3, 4

# Of this many tiles, which fit into a group or two, none is deferred to a later pass for being slow.
FEW = 32
# A group takes as many rounds as its slowest tile; so where stragglers are deferred, it stops once no more than this
# share of it is uncertain.
STRAGGLERS = 0.25
# Share of zeros from which on a tile is first solved as "at most n", in which zeros do not tie.
_FULL_OF_ZEROS = 0.25


class Grid(NamedTuple):
    """Where the weights and the masks of a grid of tiles lie: addresses, and strides in elements and in bytes.

    The strides are those of a tile row (`down`), a tile column (`across`), and a row of a tile (`row`).
    """

    weights: int
    weights_down: int
    weights_across: int
    weights_row: int
    masks: int
    masks_down: int
    masks_across: int
    masks_row: int
    tiles_across: int


class Task(NamedTuple):
    """The part of a pass's arguments that every function of it needs; see `equilibrate_strict`."""

    at: Layout
    n: int
    m: int
    grid: Grid
    potentials: NDArray[Any]
    at_most: bool


class Tiles(NamedTuple):
    """Tiles to be solved: where they are, column potentials to start from, and what is to become of each."""

    where: NDArray[Any]
    potentials: NDArray[Any]
    stages: NDArray[Any]


@inner_kernel
def dequeue(stage, queue, count, batch, batch_potentials):
    """Move the tiles of a queue that wait for a stage into a batch; close up the others. Return how many are moved."""
    moved = 0
    for k in range(count):
        if queue.stages[k] == stage:
            batch[moved] = queue.where[k]
            for j in range(queue.potentials.shape[1]):
                batch_potentials[moved, j] = queue.potentials[k, j]
            moved += 1
        else:
            queue.where[k - moved] = queue.where[k]
            for j in range(queue.potentials.shape[1]):
                queue.potentials[k - moved, j] = queue.potentials[k, j]
            queue.stages[k - moved] = queue.stages[k]
    return moved


@inner_kernel
def load(code, task, vectors, tiles, start, first, in_group, warm):
    """Load a group of tiles, the last of them also into lanes that would be empty, and the potentials to start from."""
    at, grid, work = task.at, task.grid, vectors.numbers
    for lane in range(at.lanes):
        given = first + min(lane, in_group - 1)
        vectors.words[word(at, OFFSETS, 0, lane)] = _place(tiles[given], grid.weights_down, grid.weights_across)
        if warm:
            for j in range(task.m):
                work[at.v + j, lane] = start[given, j]
    call(code.load, vectors, grid.weights, grid.weights_row, 0, 0.0)
    # Of the vectors of `Layout`, v comes after u, and best after v.
    for potential in range(at.u, at.v if warm else at.best):
        for lane in range(at.lanes):
            work[potential, lane] = 0


@inner_kernel
def clamp_potentials(task, vectors):
    """Raise column potentials below zero to zero."""
    for j in range(task.m):
        for lane in range(task.at.lanes):
            if vectors.numbers[task.at.v + j, lane] < 0:
                vectors.numbers[task.at.v + j, lane] = 0


@inner_kernel
def solve_constant(code, task, vectors, tiles, first, waiting):
    """Solve tiles whose entries are all the same, for which any mask will do; return the lanes that still wait."""
    at = task.at
    for lane in range(at.lanes):
        largest = vectors.integers[LARGEST, lane]
        is_constant = largest == vectors.integers[LEAST, lane] and largest < infinity(vectors)
        if is_constant and (waiting >> lane) & 1:
            row = (np.int64(1) << task.n) - 1
            for i in range(task.m):
                vectors.words[word(at, at.bits, i, lane)] = row
                # Each row is the one before, rotated by one; bits from m on are not looked at.
                row = (row << 1) | ((row >> (task.m - 1)) & 1)
                # Potentials of zero prove every such mask.
                vectors.numbers[at.v + i, lane] = 0
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
            lowest = work[LOWEST, lane]
            passes = work[least, lane] + lowest > rounding * work[LARGEST, lane]
        elif clamp and not task.at_most:
            passes = vectors.integers[SHORT, lane] == 0 or fill_with_zeros(
                vectors.words,
                word(at, at.bits, 0, lane),
                word(at, at.zero_bits, 0, lane),
                at.lanes,
                word(at, at.scratch, 0, 0),
                task.n,
                task.m,
            )
        if passes:
            # Under "at most n", potentials less the least of them are not negative, and neither are the rows' with it.
            _store(code, task, vectors, tiles[first + lane], lane, lowest)
        else:
            failed |= 1 << lane
    return failed


@inner_kernel
def _store(code, task, vectors, tile, lane, lowest):
    """Store the mask of a lane, and its column potentials less `lowest`."""
    at, grid = task.at, task.grid
    mask = grid.masks + _place(tile, grid.masks_down, grid.masks_across)
    call(code.store, vectors, mask, grid.masks_row, lane, 0.0)
    if len(task.potentials) > 0:
        where = _place(tile, grid.tiles_across, 1)
        for j in range(task.m):
            task.potentials[where, j] = vectors.numbers[at.v + j, lane] - lowest


@inner_kernel
def enqueue(task, vectors, lane, tile, stage, shift, queue, count):
    """Add the tile of a lane to a queue, its column potentials less `shift`; return how many it holds now."""
    at = task.at
    queue.where[count] = tile
    queue.stages[count] = stage
    for j in range(task.m):
        queue.potentials[count, j] = vectors.numbers[at.v + j, lane] - shift
    return count + 1


@inner_kernel
def shift_to_at_most(task, vectors, lane, least):
    """Return the shift of column potentials that splits the shortfall for "at most n" between rows and columns."""
    work = vectors.numbers
    return 0.5 * (work[LOWEST, lane] - work[least, lane])


@inner_kernel
def _place(tile, down, across):
    return (tile >> 32) * down + (tile & 0xFFFFFFFF) * across


@inner_kernel
def count_bits(bits):
    """Return how many bits are set."""
    count = 0
    while bits != 0:
        count += 1
        bits &= bits - 1
    return count


@inner_kernel
def strict_lanes(task, vectors, lanes):
    """Return those of some lanes whose choice is strictly best in every row, and puts n in every column."""
    at, strict = task.at, 0
    for lane in range(at.lanes):
        if vectors.integers[STRICT, lane] != 0:
            strict |= 1 << lane
    return strict & lanes


@inner_kernel
def proven_lanes(task, vectors, lanes):
    """Return those of some lanes whose choice is proven to be the only optimum (docs/proof.md)."""
    at, proven = task.at, 0
    for lane in range(at.lanes):
        if vectors.integers[STRICT, lane] != 0 and vectors.numbers[WRONG, lane] == 0:
            proven |= 1 << lane
    return proven & lanes


@inner_kernel
def is_full_of_zeros(task, vectors, lane):
    """Return whether so many entries are zero that the tile is better solved as "at most n" first."""
    return vectors.numbers[ZEROS, lane] >= _FULL_OF_ZEROS * task.m * task.m


@inner_kernel
def infinity(vectors):
    """Return the bits of infinity, as an integer."""
    return 0x7F800000 if vectors.numbers.itemsize == 4 else 0x7FF0000000000000
