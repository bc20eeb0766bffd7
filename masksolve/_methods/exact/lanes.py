"""Load tiles into the lanes of vectors, store their masks, and query what is known of each lane."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._methods.exact.fill_zeros import fill_with_zeros
from masksolve._methods.exact.inner_loops import call
from masksolve._methods.exact.layout import (
    ENTRIES,
    LARGEST,
    LEAST,
    LOWEST,
    OFFSETS,
    SHORT,
    STRICT,
    WORD_BITS,
    WRONG,
    ZEROS,
    Layout,
    word,
)
from masksolve._translated import inner

# What is to become of a tile: it is to be equilibrated as "exactly n" or as "at most n", in the dtype of the weights or
# in float64, perturbed; or it is to be solved by other means.
AS_EXACTLY, AS_AT_MOST, TIES_EXACTLY, TIES_AT_MOST, UNSOLVED = 0, 1, 2, 3, 4

# Of this many tiles, which fit into a group or two, none is deferred to a later pass for being slow.
FEW = 32
# A group takes as many rounds as its slowest tile; so where stragglers are deferred, it stops once no more than this
# share of it is uncertain.
STRAGGLERS = 0.25
# Share of zeros from which on a tile is first solved as "at most n", in which zeros do not tie.
FULL_OF_ZEROS = 0.25


class Grid(NamedTuple):
    """Where the weights and the masks of a grid of tiles lie: addresses, and strides in elements and in bytes.

    The strides are those of a tile row (`down`), a tile column (`across`), and a row of a tile (`row`). A tile has
    `rows` and `cols`; where these are fewer than m, what lies beyond them belongs to nobody, but is there.
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
    rows: int
    cols: int


class Task(NamedTuple):
    """The part of a pass's arguments that every function of it needs; see `equilibrate_strict`."""

    at: Layout
    n: int
    m: int
    grid: Grid
    potentials: NDArray[Any]
    at_most: bool
    exact_rows: bool
    exact_columns: bool
    is_partial: bool


class Tiles(NamedTuple):
    """Tiles to be solved: where they are, column potentials to start from, and what is to become of each."""

    where: NDArray[Any]
    potentials: NDArray[Any]
    stages: NDArray[Any]


@inner
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


@inner
def load(code, task, vectors, tiles, start, first, in_group):
    """Load a group of tiles, the last of them also into lanes that would be empty, and the potentials to start from."""
    at, grid, work = task.at, task.grid, vectors.numbers
    for lane in range(at.lanes):
        given = first + min(lane, in_group - 1)
        vectors.words[word(at, OFFSETS, 0, lane)] = _place(tiles[given], grid.weights_down, grid.weights_across)
        for j in range(task.m):
            work[at.v + j, lane] = start[given, j]
    call(code.load, vectors, grid.weights, grid.weights_row, 0, 0.0)
    if task.is_partial:
        _load_nothing_beyond(task, vectors)
    # Of the vectors of `Layout`, v comes after u.
    for potential in range(at.u, at.v):
        for lane in range(at.lanes):
            work[potential, lane] = 0


@inner
def _load_nothing_beyond(task, vectors):
    """Make entries beyond the lines of a partial tile less than all others: no line ever chooses them.

    Their own lines are never looked at, so that potentials stay 0 there.
    """
    m, rows, cols = task.m, task.grid.rows, task.grid.cols
    for i in range(m):
        for j in range(0 if i >= rows else cols, m):
            for lane in range(task.at.lanes):
                vectors.numbers[ENTRIES + i * task.at.pitch + j, lane] = -np.inf


@inner
def move_rows(code, task, vectors, step):
    """Move row potentials by `step`, in units of the way to the middle."""
    call(code.move_rows, vectors, 0, 0, task.grid.rows, step)


@inner
def move_columns(code, task, vectors, step):
    """Move column potentials by `step`, in units of the way to the middle."""
    call(code.move_columns, vectors, 0, 0, task.grid.cols, step)


@inner
def choose(code, task, vectors):
    """Choose the best entries of every row, and judge the choice."""
    call(code.choose, vectors, 0, 0, task.grid.rows, 0.0)
    if task.is_partial:
        # Columns that are not there are right as they are.
        for j in range(task.grid.cols, task.m):
            for lane in range(task.at.lanes):
                vectors.integers[task.at.counts + j, lane] = task.n
        call(code.judge, vectors, 0, 0, 0, 0.0)


@inner
def fill(code, task, vectors):
    """Fill the choice up with zeros, as far as that can be done line by line; where it can, SHORT is 0."""
    call(code.fill, vectors, 0, 0, task.grid.rows, 0.0)
    if not task.exact_rows:
        # Only columns have to be full.
        at = task.at
        for lane in range(at.lanes):
            short = 0
            for j in range(task.grid.cols):
                short |= task.n - vectors.integers[at.counts + j, lane]
            vectors.integers[SHORT, lane] = short


@inner
def clamp_potentials(task, vectors):
    """Raise column potentials below zero to zero."""
    for j in range(task.m):
        for lane in range(task.at.lanes):
            if vectors.numbers[task.at.v + j, lane] < 0:
                vectors.numbers[task.at.v + j, lane] = 0


@inner
def solve_constant(code, task, vectors, tiles, first, waiting):
    """Solve tiles whose entries are all the same, for which any mask will do; return the lanes that still wait."""
    at, grid = task.at, task.grid
    # Ones in a row, one further in each row, and round again, where rows are as long as columns at least, or else as if
    # they were: that fills all lines of the longer kind, and no other holds more.
    length = max(grid.rows, grid.cols)
    for lane in range(at.lanes):
        largest = vectors.integers[LARGEST, lane]
        is_constant = largest == vectors.integers[LEAST, lane] and largest < infinity(vectors)
        if is_constant and (waiting >> lane) & 1:
            for i in range(grid.rows):
                end = i + task.n
                for number in range(at.row_words):
                    before = number * WORD_BITS
                    row = _ones(min(end, length) - before) & ~_ones(i - before) | _ones(end - length - before)
                    vectors.words[word(at, at.bits, i * at.row_words + number, lane)] = row
            # Full rows are proven by potentials of zero, full columns by those that are worth all of their entries.
            potential = 0.0 if grid.cols == length else vectors.numbers[ENTRIES, lane]
            for j in range(grid.cols):
                vectors.numbers[at.v + j, lane] = potential
            _store(code, task, vectors, tiles[first + lane], lane, 0.0)
            waiting &= ~(1 << lane)
    return waiting


@inner
def _ones(count):
    """Return a word of which the first bits are set, `count` or what of them is there."""
    if count >= WORD_BITS:
        return np.int64(-1)
    return (np.int64(1) << max(count, 0)) - 1


@inner
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
                at.row_words,
                word(at, at.scratch, 0, 0),
                task.n,
                task.m,
                task.grid.rows,
                task.grid.cols,
                task.exact_rows,
            )
        if passes:
            # Under "at most n", potentials less the least of them are not negative, and neither are the rows' with it.
            _store(code, task, vectors, tiles[first + lane], lane, lowest)
        else:
            failed |= 1 << lane
    return failed


@inner
def _store(code, task, vectors, tile, lane, lowest):
    """Store the mask of a lane, and its column potentials less `lowest`."""
    at, grid = task.at, task.grid
    store_choice(code, task, vectors, tile, lane)
    if len(task.potentials) > 0:
        where = _place(tile, grid.tiles_across, 1)
        for j in range(task.m):
            task.potentials[where, j] = vectors.numbers[at.v + j, lane] - lowest


@inner
def store_choice(code, task, vectors, tile, lane):
    """Write the choice of a lane as its tile's mask."""
    grid = task.grid
    mask = grid.masks + _place(tile, grid.masks_down, grid.masks_across)
    call(code.store, vectors, mask, grid.masks_row, lane, 0.0)


@inner
def enqueue(task, vectors, lane, tile, stage, shift, queue, count):
    """Add the tile of a lane to a queue, its column potentials less `shift`; return how many it holds now."""
    at = task.at
    queue.where[count] = tile
    queue.stages[count] = stage
    for j in range(task.m):
        queue.potentials[count, j] = vectors.numbers[at.v + j, lane] - shift
    return count + 1


@inner
def shift_to_at_most(task, vectors, lane, least):
    """Return the shift of column potentials that splits the shortfall for "at most n" between rows and columns."""
    work = vectors.numbers
    return 0.5 * (work[LOWEST, lane] - work[least, lane])


@inner
def _place(tile, down, across):
    return (tile >> 32) * down + (tile & 0xFFFFFFFF) * across


@inner
def count_bits(bits):
    """Return how many bits are set."""
    count = 0
    while bits != 0:
        count += 1
        bits &= bits - 1
    return count


@inner
def strict_lanes(task, vectors, lanes):
    """Return those of some lanes whose choice is strictly best in every row, and puts n in every column."""
    at, strict = task.at, 0
    for lane in range(at.lanes):
        if vectors.integers[STRICT, lane] != 0:
            strict |= 1 << lane
    return strict & lanes


@inner
def proven_lanes(task, vectors, lanes):
    """Return those of some lanes whose choice is proven to be the only optimum (docs/proof.md)."""
    at, proven = task.at, 0
    for lane in range(at.lanes):
        if vectors.integers[STRICT, lane] != 0 and vectors.numbers[WRONG, lane] == 0:
            proven |= 1 << lane
    return proven & lanes


@inner
def is_full_of_zeros(task, vectors, lane):
    """Return whether enough entries are zero for the tile to be better solved as "at most n" first."""
    return vectors.numbers[ZEROS, lane] >= FULL_OF_ZEROS * task.grid.rows * task.grid.cols


@inner
def infinity(vectors):
    """Return the bits of infinity, as an integer."""
    return 0x7F800000 if vectors.numbers.itemsize == 4 else 0x7FF0000000000000
