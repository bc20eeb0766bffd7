"""Passes of equilibration in 16-bit integers, each finer than the one before, over tiles that are not proven yet."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._methods.exact.inner_loops import narrow_call as call
from masksolve._methods.exact.lanes import Grid
from masksolve._methods.exact.narrow.layout import KEEP_COLUMNS, KEEP_ROWS, LANES, Layout, unpack
from masksolve._translated import inner, translated_with_vectors

# Share of the first group of tiles that has to be proven for the others to be tried at all: ties hardly ever are.
_WORTH_TRYING = 0.5
# Share that a pass has to prove of what is left of the first group, unless no more than this is left of it.
_WORTH_REFINING = 0.25
_INFINITY = 0x7F800000


class Pass(NamedTuple):
    """The rounds of a pass, and how far potentials move in them, in units of the way to the middle.

    That is `relaxation` in round 0, and `growth` more each round, up to `largest`.
    """

    rounds: int
    relaxation: float
    growth: float
    largest: float


class _Group(NamedTuple):
    """What is known of a group of tiles, lane by lane: views of its memory, as `layout.Layout` says."""

    memory: NDArray[Any]
    weights: NDArray[Any]
    masks: NDArray[Any]
    largest: NDArray[Any]
    proven: NDArray[Any]
    columns: NDArray[Any]
    rows: NDArray[Any]


class _Queue(NamedTuple):
    """Tiles to be solved: where they are, and the potentials of their columns and of their rows."""

    where: NDArray[Any]
    columns: NDArray[Any]
    rows: NDArray[Any]


class _Task(NamedTuple):
    """What every function of a pass needs to know."""

    at: Layout
    grid: Grid
    potentials: NDArray[Any]
    at_most: bool


@translated_with_vectors
def equilibrate_narrow(
    program, clamped, grid, tiles, start, memory, passes, clamped_passes, potentials, where, columns, rows, at_most
) -> tuple[int, int]:
    """Solve tiles of a grid; return how many remain as "exactly n" and as "at most n"; -1 if a weight is not finite.

    Parameters
    ----------
    program, clamped
        `inner_loops.narrow_program`, without and with clamps.
    grid
        What `Grid` holds.
    tiles
        (k): where the tiles are, tile row * 2**32 + tile column.
    start
        (k, c): column potentials to start from; or empty.
    memory
        `layout.new_memory`.
    passes, clamped_passes
        (passes, 5): by how many bits each is finer than the first, and what its `Pass` holds; without and with clamps.
    potentials
        (tiles in the grid, c): where column potentials found are written; or empty.
    where, columns, rows
        (2, k), (2, k, c), (2, k, r): filled with the tiles that remain and their potentials, [0] as "exactly n" and [1]
        as "at most n".
    at_most
        Whether lines may hold fewer than n.
    """
    code, at = unpack(program)
    clamped_code, _ = unpack(clamped)
    task = _Task(at, Grid(*grid), potentials, at_most)
    group = _Group(
        memory,
        memory[at.weights : at.weights + 8 * LANES].view(np.int64),
        memory[at.masks : at.masks + 8 * LANES].view(np.int64),
        memory[at.largest : at.largest + 4 * LANES].view(np.int32),
        memory[at.proven : at.proven + 4 * LANES].view(np.int32),
        memory[at.columns : at.columns + 4 * LANES * at.column_width].view(np.float32).reshape(LANES, -1),
        memory[at.rows : at.rows + 4 * LANES * at.row_width].view(np.float32).reshape(LANES, -1),
    )
    exactly = _Queue(where[0], columns[0], rows[0])
    as_at_most = _Queue(where[1], columns[1], rows[1])
    given = _Queue(tiles, start, rows[0])
    left, others, first = 0, 0, 0
    # One group goes through all passes first: it shows whether the rest is worth trying.
    stop = min(LANES, len(tiles))
    # A bit for each pass.
    is_worth_it = -1
    while first < len(tiles):
        keeps = KEEP_COLUMNS if len(start) > 0 else 0
        before = left
        left, others = _run(code, task, group, given, first, stop, exactly, left, as_at_most, others, passes[0], keeps)
        if left < 0:
            return -1, 0
        for number in range(1, len(passes)):
            unproven = left - before
            if unproven > 0 and (first == 0 or (is_worth_it >> number) & 1):
                keeps = KEEP_COLUMNS | KEEP_ROWS
                left, others = _run(
                    code, task, group, exactly, before, left, exactly, before, as_at_most, others, passes[number], keeps
                )
            if first == 0:
                gained = unproven - (left - before)
                if unproven > _WORTH_REFINING * stop and gained <= _WORTH_REFINING * unproven:
                    is_worth_it &= ~(1 << number)
        first = stop
        if left <= (1 - _WORTH_TRYING) * stop:
            stop = len(tiles)
        else:
            break
    for k in range(first, len(tiles)):
        exactly.where[left] = tiles[k]
        for j in range(columns.shape[2]):
            exactly.columns[left, j] = start[k, j] if len(start) > 0 else 0
        left += 1
    for number in range(len(clamped_passes)):
        if others > 0:
            others, _ = _run(
                clamped_code,
                task,
                group,
                as_at_most,
                0,
                others,
                as_at_most,
                0,
                as_at_most,
                -1,
                clamped_passes[number],
                KEEP_COLUMNS | KEEP_ROWS,
            )
    return left, others


@inner
def _run(code, task, group, source, begin, end, queue, left, as_at_most, others, schedule, keeps):
    """Run a pass over some tiles of a source, and add those that are not proven to a queue, which may be the same.

    Return how many the queue holds then, and how many the queue of tiles to be solved as "at most n", because as
    "exactly n" does not do; where that holds -1, there is none.
    """
    grid = task.grid
    finer, rounds, relaxation = schedule[0], schedule[1], schedule[2]
    growth, largest = schedule[3], schedule[4]
    for first in range(begin, end, LANES):
        in_group = min(LANES, end - first)
        for lane in range(LANES):
            number = first + min(lane, in_group - 1)
            down, across = source.where[number] >> 32, source.where[number] & 0xFFFFFFFF
            group.weights[lane] = down * grid.weights_down + across * grid.weights_across
            group.masks[lane] = down * grid.masks_down + across * grid.masks_across
            if keeps & KEEP_COLUMNS:
                for j in range(source.columns.shape[1]):
                    group.columns[lane, j] = source.columns[number, j]
            if keeps & KEEP_ROWS:
                for i in range(source.rows.shape[1]):
                    group.rows[lane, i] = source.rows[number, i]
        call(code.load, group.memory, grid.weights, grid.weights_row, keeps | int(finer), 0)
        top = 0
        for lane in range(LANES):
            top = max(top, group.largest[lane])
        if top >= _INFINITY:
            return -1, others
        beyond = 0
        for round_ in range(int(rounds)):
            call(code.move_rows, group.memory, beyond, 0, 0, 0)
            beyond = int(32768 * (min(largest, relaxation + growth * round_) - 1))
            call(code.move_columns, group.memory, beyond, 0, 0, 0)
        call(code.prove, group.memory, grid.weights, grid.weights_row, grid.masks_row, grid.masks)
        for lane in range(in_group):
            tile = source.where[first + lane]
            if group.proven[lane] == 0:
                _enqueue(queue, left, group, lane, tile, np.float32(0.0))
                left += 1
                continue
            lowest = np.float32(0.0)
            if task.at_most and others >= 0:
                worst = np.float32(np.inf)
                lowest = np.float32(np.inf)
                for j in range(queue.columns.shape[1]):
                    lowest = min(lowest, group.columns[lane, j])
                for i in range(queue.rows.shape[1]):
                    worst = min(worst, group.rows[lane, i])
                if lowest + worst < 0:
                    # Half of what is lacking to rows, half to columns.
                    _enqueue(as_at_most, others, group, lane, tile, np.float32(0.5) * (lowest - worst))
                    others += 1
                    continue
            # Under "at most n", potentials less the least of them are not negative, and neither are the rows' with it.
            if len(task.potentials) > 0:
                _store_potentials(task, group, lane, tile, lowest)
    return left, others


@inner
def _enqueue(queue, number, group, lane, tile, shift):
    queue.where[number] = tile
    for j in range(queue.columns.shape[1]):
        queue.columns[number, j] = group.columns[lane, j] - shift
    for i in range(queue.rows.shape[1]):
        queue.rows[number, i] = group.rows[lane, i] + shift


@inner
def _store_potentials(task, group, lane, tile, lowest):
    number = (tile >> 32) * task.grid.tiles_across + (tile & 0xFFFFFFFF)
    for j in range(task.potentials.shape[1]):
        task.potentials[number, j] = group.columns[lane, j] - lowest
