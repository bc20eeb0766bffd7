"""Equilibration in float64, of tiles that tie: they are perturbed, until one optimum is left."""

from masksolve._jit import inner_kernel, kernel
from masksolve._methods.exact.inner_loops import call
from masksolve._methods.exact.lanes import (
    FEW,
    SLOW,
    TIES_AT_MOST,
    TIES_EXACTLY,
    UNSOLVED,
    Task,
    Tiles,
    clamp_potentials,
    count_bits,
    leave,
    load,
    shift_to_at_most,
    store_proven,
    strict_lanes,
    take,
)
from masksolve._methods.exact.layout import (
    LARGEST,
    LESS_NONZERO,
    LESS_ZERO,
    MARGIN,
    NONZERO,
    QUANTUM,
    SMALLEST,
    THRESHOLD,
    WRONG,
    ZERO,
    ZEROS,
    Vectors,
    unpack,
)

# Weights that are multiples of this share of the largest one, or coarser, are perturbed; zeros by this share of it.
_COARSE_GRID = 2.0**-30
_ZERO_DELTA = 2.0**-10
_REFINE = 2.0**-4
# Far above the rounding of all reduced costs of a tile together, as a share of its largest weight.
_ROUNDING = 2.0**-33
# Perturbations stay above this share of the largest weight; weights out of this range are not perturbed:
# differences of floats are exact to their last bit only as long as nothing overflows or gets subnormal.
_LEAST_DELTA = 2.0**-44
_SMALLEST_TOP, _LARGEST_TOP = 2.0**-900, 2.0**1000


@kernel
def equilibrate_perturbed(
    program,
    grid,
    numbers,
    integers,
    words,
    rounds,
    relaxation,
    shares_address,
    potentials,
    left,
    left_potentials,
    left_stages,
    left_count,
    at_most,
):
    """Solve tiles in float64, perturbed where they tie; return how many are left.

    Parameters
    ----------
    program
        `inner_loops.program` for float64.
    rounds
        (first round that is checked, last round, rounds between checks).
    shares_address
        Of (m * m) float64: the perturbation of each entry, between 0 and 1 times what the tile allows.
    left, left_potentials, left_stages, left_count
        The tiles, as `equilibrate_strict` leaves them, and how many; then those that are left.

    The other parameters are those of `equilibrate_strict`.
    """
    code, clamped, at, n, m = unpack(program)
    task = Task(at, n, m, grid, potentials, at_most)
    vectors = Vectors(numbers, integers, words)
    rest = Tiles(left[0], left_potentials[0], left_stages)
    some, some_start = left[1], left_potentials[1]

    for number in range(4):
        # Both stages in haste and not; the one that may leave tiles to the other comes first.
        clamp = (number >= 2) == at_most
        stage = TIES_AT_MOST if clamp else TIES_EXACTLY
        moves = clamped if clamp else code
        count = take(stage, rest, left_count, some, some_start)
        left_count -= count
        in_haste = number % 2 == 0 and count > FEW
        after = stage if in_haste else TIES_EXACTLY if clamp and not at_most else UNSOLVED

        for first in range(0, count, at.lanes):
            in_group = min(at.lanes, count - first)
            waiting = (1 << in_group) - 1
            load(code, task, vectors, some, some_start, first, in_group, True)
            if clamp:
                clamp_potentials(task, vectors)
            call(code.measure, vectors, 0, 0, 0, 0.0)
            call(code.find_zeros, vectors, 0, 0, 0, 0.0)
            _choose_perturbation(task, vectors, clamp)
            _add_perturbation(code, task, vectors, shares_address)

            for round_ in range(rounds[1] + 1):
                if count_bits(waiting) <= (SLOW * at.lanes if in_haste else 0):
                    break
                call(moves.move_rows, vectors, 0, 0, 0, relaxation if round_ > 0 else 1.0)
                call(moves.move_columns, vectors, 0, 0, 0, relaxation)
                if round_ < rounds[0] or (round_ - rounds[0]) % rounds[2] != 0:
                    continue
                call(moves.choose, vectors, 0, 0, 0, 0.0)
                candidates = strict_lanes(task, vectors, waiting)
                if candidates == 0:
                    continue
                call(moves.weigh, vectors, shares_address, 0, 0, 0.0)
                if clamp and not at_most:
                    call(code.fill, vectors, 0, 0, 0, 0.0)
                certain = _proven_unperturbed(task, vectors, candidates)
                failed = store_proven(code, task, vectors, some, first, certain, clamp, THRESHOLD, _ROUNDING)
                waiting &= ~certain
                for lane in range(in_group):
                    if (failed >> lane) & 1:
                        following = TIES_EXACTLY if clamp else TIES_AT_MOST
                        shift = 0.0 if clamp else shift_to_at_most(task, vectors, lane, THRESHOLD)
                        left_count = leave(task, vectors, lane, some[first + lane], following, shift, rest, left_count)
                if _refine_perturbation(task, vectors, candidates & ~certain):
                    _add_perturbation(code, task, vectors, shares_address)

            for lane in range(in_group):
                if (waiting >> lane) & 1:
                    left_count = leave(task, vectors, lane, some[first + lane], after, 0.0, rest, left_count)
    return left_count


@inner_kernel
def _proven_unperturbed(task, vectors, lanes):
    """Those of some lanes, strictly best for the perturbed tile, that are proven optimal for the tile itself."""
    at, proven = task.at, 0
    for lane in range(at.lanes):
        if (lanes >> lane) & 1 and _is_proven_unperturbed(at, vectors.numbers, lane, task.m):
            proven |= 1 << lane
    return proven


@inner_kernel
def _is_proven_unperturbed(at, work, lane, m):
    top = work[LARGEST * at.lanes + lane]
    wrong = work[WRONG * at.lanes + lane]
    if work[NONZERO * at.lanes + lane] == 0 and work[ZERO * at.lanes + lane] == 0:
        return wrong == 0
    for j in range(m):
        if not abs(work[(at.v + j) * at.lanes + lane]) <= 8 * top:
            return False
    rounding = top * _ROUNDING
    is_clear = work[MARGIN * at.lanes + lane] > 2 * wrong + rounding
    return is_clear or wrong + rounding < work[QUANTUM * at.lanes + lane]


@inner_kernel
def _choose_perturbation(task, vectors, clamp):
    """How far entries of each tile are to be perturbed; not at all where that could not be vouched for."""
    at, work = task.at, vectors.numbers
    for lane in range(at.lanes):
        top = work[LARGEST * at.lanes + lane]
        quantum = work[QUANTUM * at.lanes + lane]
        delta, zero_delta = 0.0, 0.0
        if _SMALLEST_TOP < top < _LARGEST_TOP:
            if quantum >= top * _COARSE_GRID:
                delta = 2 * quantum / task.m
            if not clamp and work[ZEROS * at.lanes + lane] > 0:
                zero_delta = max(delta, min(top * _ZERO_DELTA, 0.5 * work[SMALLEST * at.lanes + lane]))
                if zero_delta < top * _LEAST_DELTA:
                    zero_delta = 0.0
        work[LESS_NONZERO * at.lanes + lane] = delta
        work[LESS_ZERO * at.lanes + lane] = zero_delta
        work[NONZERO * at.lanes + lane] = 0.0
        work[ZERO * at.lanes + lane] = 0.0


@inner_kernel
def _refine_perturbation(task, vectors, lanes):
    """Make the perturbation of some lanes smaller, if it can be; return whether that of any is."""
    at, work = task.at, vectors.numbers
    refined = False
    for lane in range(at.lanes):
        nonzero, zero = work[NONZERO * at.lanes + lane], work[ZERO * at.lanes + lane]
        is_large = max(nonzero, zero) * _REFINE > work[LARGEST * at.lanes + lane] * _LEAST_DELTA
        less = _REFINE - 1 if is_large and (lanes >> lane) & 1 else 0.0
        work[LESS_NONZERO * at.lanes + lane] = nonzero * less
        work[LESS_ZERO * at.lanes + lane] = zero * less
        refined |= less != 0
    return refined


@inner_kernel
def _add_perturbation(code, task, vectors, shares_address):
    at, work = task.at, vectors.numbers
    call(code.perturb, vectors, shares_address, LESS_ZERO, LESS_NONZERO, 0.0)
    for lane in range(at.lanes):
        work[NONZERO * at.lanes + lane] += work[LESS_NONZERO * at.lanes + lane]
        work[ZERO * at.lanes + lane] += work[LESS_ZERO * at.lanes + lane]
