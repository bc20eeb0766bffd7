"""Equilibration in the dtype of the weights, of tiles that have one optimum only."""

from masksolve._jit import inner_kernel, kernel
from masksolve._methods.exact.inner_loops import call
from masksolve._methods.exact.lanes import (
    AS_AT_MOST,
    AS_EXACTLY,
    FEW,
    SLOW,
    TIES_AT_MOST,
    TIES_EXACTLY,
    Task,
    Tiles,
    clamp_potentials,
    count_bits,
    infinity,
    is_full_of_zeros,
    leave,
    load,
    proven_lanes,
    shift_to_at_most,
    solve_constant,
    store_proven,
    take,
)
from masksolve._methods.exact.layout import LARGEST, WORST, Vectors, unpack

# Stages, and whether in haste. The first is that of all tiles; none goes back to an earlier one.
_PASSES = ((AS_EXACTLY, True), (AS_EXACTLY, False), (AS_AT_MOST, True), (AS_AT_MOST, False))
# Checks in a row that certify no tile, after which those of a group that are not yet certified are taken to tie; unless
# they are nearly all of it: then it goes on.
_PATIENCE = 3
_NEARLY_ALL = 0.75
# Groups in a row that were left for their greater part, after which most tiles are taken to tie.
_TIED_GROUPS = 2


@kernel
def equilibrate_strict(
    program,
    grid,
    tiles,
    start,
    numbers,
    integers,
    words,
    rounds,
    relaxations,
    potentials,
    left,
    left_potentials,
    left_stages,
    at_most,
):
    """Solve tiles of a grid that have one optimum; return how many are left, or -1 for weights that are not finite.

    Parameters
    ----------
    program
        `inner_loops.program` for numbers of the dtype of the weights.
    grid
        (address of the weights; their strides, in elements, of a tile row, a tile column and a row in a tile;
        address of the masks; the same strides of theirs, in bytes; tiles in a tile row).
    tiles
        (k): where the tiles are, tile row * 2**32 + tile column; to divide would take as long as half the rest.
    start
        (k, m): column potentials to start from; or empty.
    numbers, integers, words
        `layout.new_vectors`.
    rounds, relaxations
        (first round that is checked, last round, both where most tiles tie, first that is checked of tiles left), and
        how far potentials move, in units of the way to the middle: (in round 0, more each round, at most, under clamp).
    potentials
        (tiles in the grid, m): where column potentials found are written; or empty.
    left, left_potentials, left_stages
        (2, k), (2, k, m), (k): [0] is filled with the tiles left, [0] with their column potentials, and the last with
        what is to become of them; the rest is overwritten.
    at_most
        Whether lines may hold fewer than n.
    """
    code, clamped, at, n, m = unpack(program)
    task = Task(at, n, m, grid, potentials, at_most)
    vectors = Vectors(numbers, integers, words)
    rest = Tiles(left[0], left_potentials[0], left_stages)
    some, some_start, count, left_count = tiles, start, len(tiles), 0

    for number in range(4):
        stage, in_haste = _PASSES[number]
        is_first = number == 0
        if not is_first:
            some, some_start = left[1], left_potentials[1]
            count = take(stage, rest, left_count, some, some_start)
            left_count -= count
        in_haste &= count > FEW
        warm = not is_first or len(start) > 0
        tied_groups = 0

        for first in range(0, count, at.lanes):
            in_group = min(at.lanes, count - first)
            waiting = (1 << in_group) - 1
            load(code, task, vectors, some, some_start, first, in_group, warm)
            clamp, ties = stage == AS_AT_MOST, False
            if clamp and not at_most:
                call(code.find_zeros, vectors, 0, 0, 0, 0.0)
            if tied_groups >= _TIED_GROUPS and not clamp:
                waiting = solve_constant(code, task, vectors, some, first, waiting)
                if waiting == 0:
                    continue
                call(code.find_zeros, vectors, 0, 0, 0, 0.0)
                clamp = 2 * _count_full_of_zeros(task, vectors) > at.lanes
                # Rounds are wasted on tiles that tie.
                ties = not clamp
            if clamp:
                clamp_potentials(task, vectors)
            first_check = (0 if warm else rounds[2] if ties else rounds[0]) if is_first else rounds[3]
            waiting, failed = _do_rounds(
                clamped if clamp else code,
                task,
                vectors,
                some,
                first,
                waiting,
                first_check,
                rounds[2] if ties else rounds[1],
                relaxations,
                warm,
                is_first,
                in_haste,
                clamp,
            )

            if not _is_finite(task, vectors):
                return -1
            if not clamp:
                mostly_left = 2 * count_bits(waiting | failed) > at.lanes
                tied_groups = tied_groups + 1 if mostly_left else 0
            if waiting | failed == 0:
                continue
            waiting = solve_constant(code, task, vectors, some, first, waiting)
            late = in_haste and count_bits(waiting) <= SLOW * at.lanes
            if waiting != 0 and not late and not clamp:
                call(code.find_zeros, vectors, 0, 0, 0, 0.0)
            for lane in range(in_group):
                if (failed >> lane) & 1:
                    following = AS_AT_MOST if at_most else TIES_EXACTLY
                elif not (waiting >> lane) & 1:
                    continue
                elif clamp:
                    following = TIES_AT_MOST if stage == AS_AT_MOST and not in_haste else AS_AT_MOST
                elif late:
                    following = AS_EXACTLY
                else:
                    following = AS_AT_MOST if is_full_of_zeros(task, vectors, lane) else TIES_EXACTLY
                shift = 0.0
                if not clamp and following == AS_AT_MOST:
                    shift = shift_to_at_most(task, vectors, lane, WORST)
                left_count = leave(task, vectors, lane, some[first + lane], following, shift, rest, left_count)
        if left_count == 0:
            break
    return left_count


@inner_kernel
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
    in_haste,
    clamp,
):
    """Equilibrate a group, and store the masks of lanes that are certified; `code` is that with or without clamp.

    Return the lanes that still wait, as bits, and those whose masks turned out not to do.
    """
    fills = clamp and not task.at_most
    # Halfway leaves the rows their half of what "at most n" shares out.
    step = 0.5 if clamp else 1.0
    uncertain, stalled, failed = count_bits(waiting), 0, 0
    for round_ in range(last + 1):
        if round_ > 0 or not warm:
            call(code.move_columns, vectors, 0, 0, 0, step)
        if round_ >= first_check:
            call(code.choose, vectors, 0, 0, 0, 0.0)
            certain = proven_lanes(task, vectors, waiting)
            before, uncertain = uncertain, count_bits(waiting & ~certain)
            stalled = stalled + 1 if uncertain == before else 0
            is_last = round_ == last or uncertain <= (SLOW * task.at.lanes if in_haste else 0)
            is_last |= stalled == _PATIENCE and uncertain <= _NEARLY_ALL * task.at.lanes
            # To fill takes longer than a round; most that are proven now will be so in the end.
            if is_last or not fills:
                if fills:
                    call(code.fill, vectors, 0, 0, 0, 0.0)
                failed |= store_proven(code, task, vectors, tiles, first, certain, clamp, WORST, 0.0)
                waiting &= ~certain
            if is_last:
                break
        if clamp:
            step = relaxations[3]
        elif is_first:
            step = min(relaxations[2], relaxations[0] + relaxations[1] * round_)
        else:
            step = relaxations[2]
        call(code.move_rows, vectors, 0, 0, 0, step if round_ > 0 else 1.0)
    return waiting, failed


@inner_kernel
def _is_finite(task, vectors):
    at, largest = task.at, 0
    for lane in range(at.lanes):
        largest = max(largest, vectors.integers[LARGEST * at.lanes + lane])
    return largest < infinity(vectors)


@inner_kernel
def _count_full_of_zeros(task, vectors):
    count = 0
    for lane in range(task.at.lanes):
        count += is_full_of_zeros(task, vectors, lane)
    return count
