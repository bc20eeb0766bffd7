"""Equilibration in the dtype of the weights, of tiles that have one optimum only (docs/proof.md)."""

from typing import NamedTuple

from masksolve._methods.exact.inner_loops import call
from masksolve._methods.exact.lanes import (
    AS_AT_MOST,
    AS_EXACTLY,
    FEW,
    STRAGGLERS,
    TIES_AT_MOST,
    TIES_EXACTLY,
    Grid,
    Task,
    Tiles,
    choose,
    clamp_potentials,
    count_bits,
    dequeue,
    enqueue,
    fill,
    infinity,
    is_full_of_zeros,
    load,
    move_columns,
    move_rows,
    proven_lanes,
    shift_to_at_most,
    solve_constant,
    store_proven,
)
from masksolve._methods.exact.layout import LARGEST, QUANTUM, WORST, Vectors, unpack
from masksolve._translated import inner, translated

# Each stage comes with stragglers deferred, and then without. "Exactly n" is that of all tiles; none goes back to an
# earlier one. Partial tiles of which no line has to be full are solved "at most n" from the start: their lines cannot
# all be full.
_PASSES, _FIRST, _FIRST_AT_MOST = 4, 0, 2
# Checks in a row that certify no tile, after which those of a group that are not yet certified are taken to tie. Unless
# they are nearly all of it, which more often need a few rounds more: then it goes on.
_PATIENCE = 3
_NEARLY_ALL = 0.75
# Groups in a row whose greater part was deferred, after which most tiles are taken to tie.
_TIED_GROUPS = 2


class Rounds(NamedTuple):
    """Rounds of equilibration.

    first_check, last
        Of all tiles: the first that is checked, and the last.
    if_tied
        Both, where most tiles tie: rounds are wasted on those.
    first_check_deferred
        Of tiles that were deferred.
    """

    first_check: int
    last: int
    if_tied: int
    first_check_deferred: int


class Relaxations(NamedTuple):
    """Steps of potentials, in units of the way to the middle.

    first, growth, largest
        In round 0, more each round, and at most.
    clamped
        Under clamp.
    """

    first: float
    growth: float
    largest: float
    clamped: float


@translated
def equilibrate_strict(
    program,
    grid,
    numbers,
    integers,
    words,
    rounds,
    relaxations,
    potentials,
    remaining,
    remaining_potentials,
    remaining_stages,
    queued,
    tried,
    exact_rows,
    exact_columns,
) -> int:
    """Solve tiles of a grid that have one optimum; return how many remain, or -1 for weights that are not finite.

    Parameters
    ----------
    program
        `inner_loops.program` for numbers of the dtype of the weights.
    grid
        What `Grid` holds.
    numbers, integers, words
        `layout.new_vectors`.
    rounds, relaxations
        What `Rounds` and `Relaxations` hold.
    potentials
        (tiles in the grid, m): where column potentials found are written; or empty.
    remaining, remaining_potentials, remaining_stages
        (2, k), (2, k, m), (k): [0] holds the tiles, tile row * 2**32 + tile column, [0] the column potentials to start
        from, and the last what is to become of them; then those that remain. The rest is overwritten.
    queued
        How many tiles.
    tried
        Whether their potentials are nearly optimal.
    exact_rows, exact_columns
        Whether rows, and columns, hold exactly n. Where it is one of the two, `program` clamps the others always.
    """
    code, clamped, at, n, m = unpack(program)
    # Named here, not by the caller, who would pay for it (`equilibrate_tiles` says why).
    grid = Grid(*grid)
    is_partial, at_most = grid.rows < m or grid.cols < m, not (exact_rows or exact_columns)
    task = Task(at, n, m, grid, potentials, at_most, exact_rows, exact_columns, is_partial)
    rounds, relaxations = Rounds(*rounds), Relaxations(*relaxations)
    vectors = Vectors(numbers, integers, words)
    queue = Tiles(remaining[0], remaining_potentials[0], remaining_stages)
    batch, batch_start = remaining[1], remaining_potentials[1]

    starts_clamped = is_partial and at_most
    first_pass = _FIRST_AT_MOST if starts_clamped else _FIRST
    for number in range(first_pass, _PASSES):
        stage = AS_EXACTLY if number < _FIRST_AT_MOST else AS_AT_MOST
        is_first = number == first_pass
        count = dequeue(stage, queue, queued, batch, batch_start)
        queued -= count
        defer_stragglers = number % 2 == 0 and count > FEW
        tied_groups = 0

        for first in range(0, count, at.lanes):
            in_group = min(at.lanes, count - first)
            waiting = (1 << in_group) - 1
            load(code, task, vectors, batch, batch_start, first, in_group)
            clamp, ties = stage == AS_AT_MOST, False
            if clamp and not at_most:
                call(code.find_zeros, vectors, 0, 0, 0, 0.0)
            is_known_to_tie = tied_groups >= _TIED_GROUPS
            # Large tiles are looked at beforehand: that costs little beside their rounds, and few come in a call.
            if (is_known_to_tie or at.row_words > 1) and (starts_clamped or not clamp):
                waiting = solve_constant(code, task, vectors, batch, first, waiting)
                if waiting == 0:
                    continue
                if not starts_clamped:
                    call(code.find_zeros, vectors, 0, 0, 0, 0.0)
                    clamp = 2 * _count_full_of_zeros(task, vectors) > at.lanes
                ties = (starts_clamped or not clamp) and (is_known_to_tie or _is_coarse(code, task, vectors))
            if clamp:
                clamp_potentials(task, vectors)
            first_check, last = rounds.first_check, rounds.last
            if ties:
                first_check = last = rounds.if_tied
            if not is_first:
                first_check = rounds.first_check_deferred
            elif tried:
                first_check = 0
            waiting, failed = _do_rounds(
                clamped if clamp else code,
                task,
                vectors,
                batch,
                first,
                waiting,
                first_check,
                last,
                relaxations,
                tried or not is_first,
                is_first,
                defer_stragglers,
                clamp,
            )

            if not _is_finite(task, vectors):
                return -1
            if starts_clamped or not clamp:
                mostly_unsolved = 2 * count_bits(waiting | failed) > at.lanes
                tied_groups = tied_groups + 1 if mostly_unsolved else 0
            if waiting | failed == 0:
                continue
            waiting = solve_constant(code, task, vectors, batch, first, waiting)
            only_stragglers = defer_stragglers and count_bits(waiting) <= STRAGGLERS * at.lanes
            if waiting != 0 and not only_stragglers and not clamp:
                call(code.find_zeros, vectors, 0, 0, 0, 0.0)
            for lane in range(in_group):
                if (failed >> lane) & 1:
                    following = AS_AT_MOST if at_most else TIES_EXACTLY
                elif not (waiting >> lane) & 1:
                    continue
                elif starts_clamped:
                    following = AS_AT_MOST if only_stragglers else TIES_AT_MOST
                elif clamp:
                    following = TIES_AT_MOST if stage == AS_AT_MOST and not defer_stragglers else AS_AT_MOST
                elif only_stragglers:
                    following = AS_EXACTLY
                else:
                    following = AS_AT_MOST if is_full_of_zeros(task, vectors, lane) else TIES_EXACTLY
                shift = 0.0
                if not clamp and following == AS_AT_MOST:
                    shift = shift_to_at_most(task, vectors, lane, WORST)
                queued = enqueue(task, vectors, lane, batch[first + lane], following, shift, queue, queued)
        if queued == 0:
            break
    return int(queued)


@inner
def _do_rounds(
    code,
    task,
    vectors,
    tiles,
    first,
    waiting,
    first_check,
    last,
    relaxations,
    warm,
    is_first,
    defer_stragglers,
    clamp,
):
    """Equilibrate a group, and store the masks of lanes that are certified; `code` is that with or without clamp.

    Return the lanes that still wait, as bits, and those whose masks turned out not to satisfy the constraint.
    """
    fills = clamp and not task.at_most
    # Lines that may be short start from potentials of 0: from too large ones they come down slowly, all together.
    only_rows_exact = task.exact_rows and not task.exact_columns
    # Halfway leaves the rows their half of what "at most n" shares out.
    step = 0.5 if clamp else 1.0
    uncertain, stalled, failed = count_bits(waiting), 0, 0
    for round_ in range(last + 1):
        if round_ > 0 or not (warm or only_rows_exact):
            move_columns(code, task, vectors, step)
        if round_ >= first_check:
            choose(code, task, vectors)
            certain = proven_lanes(task, vectors, waiting)
            before, uncertain = uncertain, count_bits(waiting & ~certain)
            stalled = stalled + 1 if uncertain == before else 0
            is_last = round_ == last or uncertain <= (STRAGGLERS * task.at.lanes if defer_stragglers else 0)
            is_last |= stalled == _PATIENCE and uncertain <= _NEARLY_ALL * task.at.lanes
            # To fill takes longer than a round; most that are proven now will be so in the end.
            if is_last or not fills:
                if fills:
                    fill(code, task, vectors)
                failed |= store_proven(code, task, vectors, tiles, first, certain, clamp, WORST, 0.0)
                waiting &= ~certain
            if is_last:
                break
        if clamp:
            step = relaxations.clamped
        elif is_first:
            step = min(relaxations.largest, relaxations.first + relaxations.growth * round_)
        else:
            step = relaxations.largest
        move_rows(code, task, vectors, step if round_ > 0 else 1.0)
    return waiting, failed


@inner
def _is_finite(task, vectors):
    at, largest = task.at, 0
    for lane in range(at.lanes):
        largest = max(largest, vectors.integers[LARGEST, lane])
    return largest < infinity(vectors)


@inner
def _is_coarse(code, task, vectors):
    """Return whether most tiles have so few different weights that some must tie."""
    call(code.measure, vectors, 0, 0, 0, 0.0)
    work, count = vectors.numbers, 0
    for lane in range(task.at.lanes):
        count += work[LARGEST, lane] <= work[QUANTUM, lane] * (task.m * task.m)
    return 2 * count > task.at.lanes


@inner
def _count_full_of_zeros(task, vectors):
    count = 0
    for lane in range(task.at.lanes):
        count += is_full_of_zeros(task, vectors, lane)
    return count
