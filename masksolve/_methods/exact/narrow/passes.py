"""Passes of equilibration in 16-bit integers, each finer than the one before, over tiles that are not proven yet."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from masksolve._methods.exact.fill_zeros import fill_with_zeros
from masksolve._methods.exact.inner_loops import narrow_call as call
from masksolve._methods.exact.lanes import FULL_OF_ZEROS, Grid
from masksolve._methods.exact.narrow.layout import (
    KEEP_COLUMNS,
    KEEP_ROWS,
    LANES,
    Layout,
    count_at_least,
    fill_lanes,
    unpack,
)
from masksolve._translated import inner, translated

# Share of the first group of tiles that has to be proven for the others to be tried at all.
_WORTH_TRYING = 0.5
# Share that a pass has to prove of a first group of what is left, unless at most _TOO_FEW_TO_TELL tiles are left.
_WORTH_REFINING = 0.5
_TOO_FEW_TO_TELL = 2
_INFINITY = 0x7F800000
# What a pass is part of: `solve_exactly`, `solve_as_at_most` or `solve_exactly_again`.
_FIRST, _AT_MOST, _AGAIN = 0, 1, 2


class Pass(NamedTuple):
    """The rounds of a pass, and how far potentials move in them, in units of the way to the middle.

    That is `relaxation` in round 0, and `growth` more each round, up to `largest`.
    """

    rounds: int
    relaxation: float
    growth: float
    largest: float


class Grain(NamedTuple):
    """The units of a pass, and what is perturbed in it.

    finer
        By how many bits units are finer than those of the first pass; of perturbed tiles, than 2**-14 of what the
        potentials take away from weights.
    quantum
        Multiples of 2**quantum units are perturbed; none if this is 0.
    spread
        By how many units at most.
    """

    finer: int
    quantum: int = 0
    spread: float = 0.0


class _Group(NamedTuple):
    """The state of a group of tiles, lane by lane: views of its memory, as `layout.Layout` says."""

    memory: NDArray[Any]
    words: NDArray[Any]
    weights: NDArray[Any]
    masks: NDArray[Any]
    largest: NDArray[Any]
    zeros: NDArray[Any]
    proven: NDArray[Any]
    lowest_column: NDArray[Any]
    lowest_row: NDArray[Any]
    shares: NDArray[Any]
    columns: NDArray[Any]
    rows: NDArray[Any]
    short: NDArray[Any]


class _Queue(NamedTuple):
    """Tiles to be solved: where they are, and the potentials of their columns and of their rows."""

    where: NDArray[Any]
    columns: NDArray[Any]
    rows: NDArray[Any]


class _Task(NamedTuple):
    """The arguments that every function of a pass needs."""

    at: Layout
    n: int
    stage: int
    grid: Grid
    shares: NDArray[Any]
    potentials: NDArray[Any]
    at_most: bool


@translated
def solve_exactly(
    program, n, grid, tiles, start, memory, passes, shares, potentials, where, columns, rows, at_most
) -> tuple[int, int, int]:
    """Solve tiles of a grid as "exactly n".

    Return how many are left to be solved as "exactly n", how many as "at most n", because many of their entries are
    zero or because that is what is asked for, and from which on the latter were not tried. The first is -1 if a weight
    is not finite.

    Parameters
    ----------
    program
        `inner_loops.narrow_program`, without clamps.
    n
        What lines hold.
    grid
        What `Grid` holds.
    tiles
        (k): where the tiles are, tile row * 2**32 + tile column.
    start
        (k, c): column potentials to start from; or empty.
    memory
        `layout.new_memory`.
    passes
        (passes, 7): what the `Grain` and the `Pass` of each hold.
    shares
        (r, c): the perturbation of each entry, between 0 and 1 times what the pass allows.
    potentials
        (tiles in the grid, c): where column potentials found are written; or empty.
    where, columns, rows
        (2, k), (2, k, c), (2, k, r): filled with the tiles that are left and their potentials, [0] as "exactly n" and
        [1] as "at most n".
    at_most
        Whether lines may hold fewer than n.
    """
    code, at = unpack(program)
    task = _Task(at, n, _FIRST, Grid(*grid), shares, potentials, at_most)
    group = _group_in(memory, at)
    given = _Queue(tiles, start, rows[0])
    exactly = _Queue(where[0], columns[0], rows[0])
    as_at_most = _Queue(where[1], columns[1], rows[1])
    keeps = KEEP_COLUMNS if len(start) > 0 else 0
    left, others, first, before = 0, 0, 0, 0
    # One group goes through all passes first: it shows whether the rest is worth trying.
    stop = min(LANES, len(tiles))
    # A bit for each pass.
    is_worth_it = -1
    while first < len(tiles):
        left, others = _run(code, task, group, given, first, stop, exactly, left, as_at_most, others, passes[0], keeps)
        if left < 0:
            return -1, 0, 0
        if first == 0 and left == stop and _are_constant(task, group):
            # Any mask will do, and is found sooner without rounds.
            left = _enqueue_untried(given, stop, exactly, left)
            break
        if first == 0 and left <= _TOO_FEW_TO_TELL and stop < len(tiles):
            # They go on with those of other groups.
            first, stop = stop, len(tiles)
            continue
        full_of_zeros, is_counted = 0, False
        for number in range(1, len(passes)):
            unproven, quantum = left - before, passes[number, 1]
            if first == 0 and unproven > (1 - _WORTH_REFINING) * stop and passes[number, 0] > 0 and quantum == 0:
                # So many tie, as a rule.
                is_worth_it &= ~(1 << number)
            if unproven > 0 and (is_worth_it >> number) & 1:
                left, others = _refine(code, task, group, exactly, before, left, as_at_most, others, passes[number])
            if first == 0:
                gained = unproven - (left - before)
                if unproven > _TOO_FEW_TO_TELL and gained <= _WORTH_REFINING * unproven:
                    is_worth_it &= ~(1 << number)
                if quantum > 0 and not is_counted:
                    is_counted = True
                    for lane in range(unproven):
                        full_of_zeros += _is_full_of_zeros(task, group, lane)
        first, before = stop, left
        if full_of_zeros > (1 - _WORTH_TRYING) * stop:
            untried = others
            others = _enqueue_untried(given, first, as_at_most, others)
            return left, others, untried
        if left > (1 - _WORTH_TRYING) * stop:
            left = _enqueue_untried(given, first, exactly, left)
            break
        stop = len(tiles)
    return left, others, others


@translated
def solve_as_at_most(
    program, n, grid, start, memory, passes, shares, potentials, where, columns, rows, left, others, untried, at_most
) -> tuple[int, int]:
    """Solve tiles that `solve_exactly` left to be solved as "at most n"; return how many are left as either.

    If "exactly n" is asked for, masks are filled up with zeros; tiles where that cannot be done are left to be solved
    as "exactly n".

    Parameters
    ----------
    program
        `inner_loops.narrow_program`, with clamps.
    left, others, untried
        What `solve_exactly` returned.

    The other parameters are those of `solve_exactly`.
    """
    code, at = unpack(program)
    task = _Task(at, n, _AT_MOST, Grid(*grid), shares, potentials, at_most)
    group = _group_in(memory, at)
    exactly = _Queue(where[0], columns[0], rows[0])
    queue = _Queue(where[1], columns[1], rows[1])
    after = 0
    # Those that were tried, which have potentials, and then those that were not.
    for part in range(2):
        keeps = KEEP_COLUMNS | KEEP_ROWS
        if part == 1:
            keeps = KEEP_COLUMNS if len(start) > 0 else 0
        first, stop = untried if part == 1 else 0, others if part == 1 else untried
        after, left = _run(code, task, group, queue, first, stop, queue, after, exactly, left, passes[0], keeps)
        if after < 0:
            return -1, 0
    others = after
    for number in range(1, len(passes)):
        others, left = _refine(code, task, group, queue, 0, others, exactly, left, passes[number])
    return left, others


@translated
def solve_exactly_again(program, n, grid, memory, passes, shares, potentials, where, columns, rows, first, left) -> int:
    """Solve tiles as "exactly n" that could not be filled up with zeros; return how many are left.

    Parameters
    ----------
    first, left
        From which on they lie in `where`, and up to which.

    The other parameters are those of `solve_exactly`.
    """
    code, at = unpack(program)
    task = _Task(at, n, _AGAIN, Grid(*grid), shares, potentials, False)
    group = _group_in(memory, at)
    queue = _Queue(where[0], columns[0], rows[0])
    for number in range(len(passes)):
        left, _ = _refine(code, task, group, queue, first, left, queue, 0, passes[number])
    count: int = left
    return count


@inner
def _group_in(memory, at):
    return _Group(
        memory,
        memory.view(np.int64),
        memory[at.weights : at.weights + 8 * LANES].view(np.int64),
        memory[at.masks : at.masks + 8 * LANES].view(np.int64),
        memory[at.largest : at.largest + 4 * LANES].view(np.int32),
        memory[at.zeros : at.zeros + 4 * LANES].view(np.int32),
        memory[at.proven : at.proven + 4 * LANES].view(np.int32),
        memory[at.lowest_column : at.lowest_column + 4 * LANES].view(np.float32),
        memory[at.lowest_row : at.lowest_row + 4 * LANES].view(np.float32),
        memory[at.shares : at.columns].view(np.float32).reshape(-1, at.column_width),
        memory[at.columns : at.columns + 4 * LANES * at.column_width].view(np.float32).reshape(LANES, -1),
        memory[at.rows : at.rows + 4 * LANES * at.row_width].view(np.float32).reshape(LANES, -1),
        memory[at.short : at.short + 8 * LANES].view(np.int64),
    )


@inner
def _are_constant(task, group):
    """Return whether the entries of each tile of a group that is loaded are all the same."""
    start, words = task.at.entries >> 3, LANES >> 2
    for k in range(words, task.grid.rows * task.grid.cols * words):
        if group.words[start + k] != group.words[start + k % words]:
            return False
    return True


@inner
def _enqueue_untried(given, first, queue, number):
    """Add the tiles given from one on to a queue; return how many it holds now."""
    for k in range(first, len(given.where)):
        queue.where[number] = given.where[k]
        for j in range(queue.columns.shape[1]):
            queue.columns[number, j] = given.columns[k, j] if len(given.columns) > 0 else 0
        number += 1
    return number


@inner
def _refine(code, task, group, queue, begin, end, other, others, schedule):
    """Run a pass over what is left in a queue, unless it proves hardly any of a first group.

    Tiles that have to be solved the other way are added to the other queue. Return how many both hold then.
    """
    left, first, stop = begin, begin, min(end, begin + LANES)
    both = KEEP_COLUMNS | KEEP_ROWS
    while first < end:
        tried, before = stop - first, left
        left, others = _run(code, task, group, queue, first, stop, queue, left, other, others, schedule, both)
        first, stop = stop, end
        if tried > _TOO_FEW_TO_TELL and left - before >= (1 - _WORTH_REFINING) * tried:
            left = _move_up(queue, first, end, left)
            first = end
    return left, others


@inner
def _move_up(queue, first, end, number):
    """Move tiles of a queue to a place before; return up to which it is filled then."""
    for k in range(first, end):
        queue.where[number] = queue.where[k]
        for j in range(queue.columns.shape[1]):
            queue.columns[number, j] = queue.columns[k, j]
        for i in range(queue.rows.shape[1]):
            queue.rows[number, i] = queue.rows[k, i]
        number += 1
    return number


@inner
def _run(code, task, group, source, begin, end, queue, left, other, others, schedule, keeps):
    """Run a pass over some tiles of a source, and add those that are not proven to a queue, which may be the same.

    Tiles that have to be solved the other way, as "at most n" or as "exactly n", are added to the other queue. Return
    how many both hold then.
    """
    grid = task.grid
    finer, quantum, spread, rounds = schedule[0], schedule[1], schedule[2], schedule[3]
    relaxation, growth, largest = schedule[4], schedule[5], schedule[6]
    load, prove = code.load, code.prove
    if quantum > 0:
        load, prove = code.load_perturbed, code.prove_perturbed
        _perturb(task, group, spread)
    for first in range(begin, end, LANES):
        in_group = min(LANES, end - first)
        _place_lanes(task, group, source, first, in_group, keeps)
        call(load, group.memory, grid.weights, grid.weights_row, keeps | int(finer), int(quantum))
        if count_at_least(group.largest.ctypes.data, _INFINITY) > 0:
            return -1, others
        beyond = 0
        for round_ in range(int(rounds)):
            call(code.move_rows, group.memory, beyond, 0, 0, 0)
            beyond = int(32768 * (min(largest, relaxation + growth * round_) - 1))
            call(code.move_columns, group.memory, beyond, 0, 0, 0)
        call(prove, group.memory, grid.weights, grid.weights_row, grid.masks_row, grid.masks)
        if task.stage == _AT_MOST and not task.at_most:
            call(code.fill, group.memory, 0, 0, 0, 0)
        if task.stage == _FIRST and (task.at_most or quantum > 0):
            call(code.find_lowest, group.memory, 0, 0, 0, 0)
        if (
            count_at_least(group.proven.ctypes.data, 1) == LANES
            and task.stage == _FIRST
            and not task.at_most
            and len(task.potentials) == 0
        ):
            continue
        for lane in range(in_group):
            tile = source.where[first + lane]
            if group.proven[lane] == 0:
                if task.stage == _FIRST and quantum > 0 and _is_full_of_zeros(task, group, lane):
                    _enqueue(other, others, group, lane, tile, _shift_to_at_most(group, lane))
                    others += 1
                else:
                    _enqueue(queue, left, group, lane, tile, np.float32(0.0))
                    left += 1
                continue
            lowest = np.float32(0.0)
            if task.stage == _AT_MOST:
                if not (task.at_most or _fill(code, task, group, lane)):
                    _enqueue(other, others, group, lane, tile, np.float32(0.0))
                    others += 1
                    continue
            elif task.at_most:
                lowest = group.lowest_column[lane]
                if lowest + group.lowest_row[lane] < 0:
                    _enqueue(other, others, group, lane, tile, _shift_to_at_most(group, lane))
                    others += 1
                    continue
            # Under "at most n", potentials less the least of them are not negative, and neither are the rows' with it.
            if len(task.potentials) > 0:
                _store_potentials(task, group, lane, tile, lowest)
    return left, others


@inner
def _place_lanes(task, group, source, first, in_group, keeps):
    """Say where a group's tiles are, the last of them in all lanes that are left, and their potentials, if kept."""
    grid, tile = task.grid, source.where[first]
    if keeps == 0 and source.where[first + in_group - 1] - tile == LANES - 1:
        # Neighbours, as most are that come from a grid: to multiply for each would take as long as a round.
        weights, masks = (
            _place(tile, grid.weights_down, grid.weights_across),
            _place(tile, grid.masks_down, grid.masks_across),
        )
        fill_lanes(group.weights.ctypes.data, weights, grid.weights_across)
        fill_lanes(group.masks.ctypes.data, masks, grid.masks_across)
    else:
        for lane in range(LANES):
            number = first + min(lane, in_group - 1)
            tile = source.where[number]
            group.weights[lane] = _place(tile, grid.weights_down, grid.weights_across)
            group.masks[lane] = _place(tile, grid.masks_down, grid.masks_across)
            if keeps & KEEP_COLUMNS:
                for j in range(source.columns.shape[1]):
                    group.columns[lane, j] = source.columns[number, j]
            if keeps & KEEP_ROWS:
                for i in range(source.rows.shape[1]):
                    group.rows[lane, i] = source.rows[number, i]


@inner
def _place(tile, down, across):
    return (tile >> 32) * down + (tile & 0xFFFFFFFF) * across


@inner
def _is_full_of_zeros(task, group, lane):
    """Return whether a perturbed tile has enough entries of zero to be better solved as "at most n"."""
    return group.zeros[lane] >= FULL_OF_ZEROS * task.grid.rows * task.grid.cols


@inner
def _shift_to_at_most(group, lane):
    """Return the shift of column potentials that splits what is lacking for "at most n" between rows and columns."""
    return np.float32(0.5) * (group.lowest_column[lane] - group.lowest_row[lane])


@inner
def _fill(code, task, group, lane):
    """Fill the mask of a tile up with zeros, and store it; return whether that can be done."""
    at, rows, cols = task.at, task.grid.rows, task.grid.cols
    if group.short[lane] != 0 and not fill_with_zeros(
        group.words,
        (at.bits >> 3) + lane,
        (at.zero_bits >> 3) + lane,
        LANES,
        1,
        at.scratch >> 3,
        task.n,
        cols,
        rows,
        cols,
        True,
    ):
        return False
    call(code.store_filled, group.memory, lane, 0, task.grid.masks_row, task.grid.masks)
    return True


@inner
def _perturb(task, group, spread):
    """Set by how much entries are perturbed, in whole units."""
    rows, cols = task.shares.shape
    for i in range(rows):
        for j in range(cols):
            group.shares[i, j] = np.float32(np.rint(spread * task.shares[i, j]))


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
