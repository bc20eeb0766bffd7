"""Equilibration in float64, of tiles that tie: perturbed, until one optimum is left (docs/proof.md, "Ties")."""

from typing import NamedTuple

from masksolve._methods.exact.inner_loops import call
from masksolve._methods.exact.lanes import (
    FEW,
    STRAGGLERS,
    TIES_AT_MOST,
    TIES_EXACTLY,
    UNSOLVED,
    Grid,
    Task,
    Tiles,
    choose,
    clamp_potentials,
    count_bits,
    dequeue,
    enqueue,
    fill,
    load,
    move_columns,
    move_rows,
    shift_to_at_most,
    store_choice,
    store_proven,
    strict_lanes,
)
from masksolve._methods.exact.layout import (
    CLEARANCE,
    LARGEST,
    LESS_NONZERO,
    LESS_ZERO,
    NONZERO,
    QUANTUM,
    SMALLEST,
    THRESHOLD,
    WORST,
    WRONG,
    ZERO,
    ZEROS,
    Vectors,
    unpack,
)
from masksolve._translated import inner, translated

# Weights that are multiples of this share of the largest one, or coarser, are perturbed; zeros by this share of it.
_COARSE_GRID = 2.0**-30
_ZERO_DELTA = 2.0**-10
_REFINE = 2.0**-4
# Far above the rounding of all reduced costs together, of a tile of at most _ROUNDED entries, as a share of its largest
# weight; it grows with the entries.
_ROUNDING, _ROUNDED = 2.0**-33, 64 * 64
# Perturbations stay above this share of the largest weight; weights out of this range are not perturbed:
# differences of floats are exact to their last bit only as long as nothing overflows or gets subnormal.
_LEAST_DELTA = 2.0**-44
_SMALLEST_TOP, _LARGEST_TOP = 2.0**-900, 2.0**1000


class PerturbedRounds(NamedTuple):
    """Rounds of perturbed tiles: the first that is checked, the last, and how many from one check to the next.

    After `patience` checks in a row that prove no tile of a group, what is left of it takes less time one at a time.
    """

    first_check: int
    last: int
    between_checks: int
    patience: int


@translated
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
    remaining,
    remaining_potentials,
    remaining_stages,
    queued,
    exact_rows,
    exact_columns,
) -> int:
    """Solve tiles in float64, perturbed where they tie; return how many remain.

    Parameters
    ----------
    program
        `inner_loops.program` for float64.
    rounds
        What `PerturbedRounds` holds.
    relaxation
        How far potentials move, in units of the way to the middle.
    shares_address
        Of (m * m) float64: the perturbation of each entry, between 0 and 1 times what the tile allows.
    remaining, remaining_potentials, remaining_stages, queued
        The tiles, as `equilibrate_strict` leaves them, and how many; then those that remain.

    The other parameters are those of `equilibrate_strict`.
    """
    code, clamped, at, n, m = unpack(program)
    grid = Grid(*grid)
    at_most = not (exact_rows or exact_columns)
    task = Task(at, n, m, grid, potentials, at_most, exact_rows, exact_columns, grid.rows < m or grid.cols < m)
    rounding = _ROUNDING * max(1.0, m * m / _ROUNDED)
    rounds = PerturbedRounds(*rounds)
    vectors = Vectors(numbers, integers, words)
    queue = Tiles(remaining[0], remaining_potentials[0], remaining_stages)
    batch, batch_start = remaining[1], remaining_potentials[1]

    for number in range(4):
        # Both stages, with stragglers deferred and then without; the one that may leave tiles to the other comes first.
        clamp = (number >= 2) == at_most
        stage = TIES_AT_MOST if clamp else TIES_EXACTLY
        moves = clamped if clamp else code
        count = dequeue(stage, queue, queued, batch, batch_start)
        queued -= count
        defer_stragglers = number % 2 == 0 and count > FEW
        least = STRAGGLERS * at.lanes if defer_stragglers else 0
        given_up = TIES_EXACTLY if clamp and not at_most else UNSOLVED

        for first in range(0, count, at.lanes):
            in_group = min(at.lanes, count - first)
            waiting = (1 << in_group) - 1
            load(code, task, vectors, batch, batch_start, first, in_group)
            if clamp:
                clamp_potentials(task, vectors)
            call(code.measure, vectors, 0, 0, 0, 0.0)
            call(code.find_zeros, vectors, 0, 0, 0, 0.0)
            _choose_perturbation(task, vectors, clamp)
            _add_perturbation(code, task, vectors, shares_address)

            stalled = 0
            for round_ in range(rounds.last + 1):
                if stalled == rounds.patience or count_bits(waiting) <= least:
                    break
                move_rows(moves, task, vectors, relaxation if round_ > 0 else 1.0)
                move_columns(moves, task, vectors, relaxation)
                if round_ < rounds.first_check or (round_ - rounds.first_check) % rounds.between_checks != 0:
                    continue
                choose(moves, task, vectors)
                candidates = strict_lanes(task, vectors, waiting)
                stalled += 1
                if candidates == 0:
                    continue
                call(moves.weigh, vectors, shares_address, 0, grid.rows, 0.0)
                if clamp and not at_most:
                    fill(code, task, vectors)
                certain = _proven_unperturbed(task, vectors, candidates, rounding)
                failed = store_proven(code, task, vectors, batch, first, certain, clamp, THRESHOLD, rounding)
                waiting &= ~certain
                if certain != 0:
                    stalled = 0
                for lane in range(in_group):
                    if (failed >> lane) & 1:
                        following = TIES_EXACTLY if clamp else TIES_AT_MOST
                        shift = 0.0 if clamp else shift_to_at_most(task, vectors, lane, THRESHOLD)
                        queued = enqueue(task, vectors, lane, batch[first + lane], following, shift, queue, queued)
                if _refine_perturbation(task, vectors, candidates & ~certain):
                    _add_perturbation(code, task, vectors, shares_address)

            after = stage if defer_stragglers and stalled < rounds.patience else given_up
            for lane in range(in_group):
                if (waiting >> lane) & 1:
                    shift = 0.0
                    if after == UNSOLVED:
                        store_choice(code, task, vectors, batch[first + lane], lane)
                        if at_most and not clamp:
                            # Augmenting paths take no potential below zero.
                            shift = shift_to_at_most(task, vectors, lane, WORST)
                    queued = enqueue(task, vectors, lane, batch[first + lane], after, shift, queue, queued)
    return int(queued)


@inner
def _proven_unperturbed(task, vectors, lanes, rounding):
    """Return those of some lanes, strictly best for the perturbed tile, that are proven optimal for the tile itself."""
    at, proven = task.at, 0
    for lane in range(at.lanes):
        if (lanes >> lane) & 1 and _is_proven_unperturbed(at, vectors.numbers, lane, task.m, rounding):
            proven |= 1 << lane
    return proven


@inner
def _is_proven_unperturbed(at, work, lane, m, rounding):
    top = work[LARGEST, lane]
    wrong = work[WRONG, lane]
    if work[NONZERO, lane] == 0 and work[ZERO, lane] == 0:
        # Not perturbed: the strict order is that of the tile itself, and proves it however reduced costs are rounded.
        return wrong == 0
    for j in range(m):
        # `rounding` holds for potentials up to this, and NaN is not.
        if not abs(work[at.v + j, lane]) <= 8 * top:
            return False
    rounding *= top
    # (b) of the proof: whoever exchanges more than zeros loses more than `wrong`, which is all that can be gained.
    is_clear = work[CLEARANCE, lane] > 2 * wrong + rounding
    # (a): masks differ by multiples of the quantum, and none gains as much.
    return is_clear or wrong + rounding < work[QUANTUM, lane]


@inner
def _choose_perturbation(task, vectors, clamp):
    """Set how far entries of each tile are to be perturbed; not at all where rounding could hide it."""
    at, work = task.at, vectors.numbers
    for lane in range(at.lanes):
        top = work[LARGEST, lane]
        quantum = work[QUANTUM, lane]
        delta, zero_delta = 0.0, 0.0
        if _SMALLEST_TOP < top < _LARGEST_TOP:
            if quantum >= top * _COARSE_GRID:
                delta = 2 * quantum / task.m
            if not clamp and work[ZEROS, lane] > 0:
                zero_delta = max(delta, min(top * _ZERO_DELTA, 0.5 * work[SMALLEST, lane]))
                if zero_delta < top * _LEAST_DELTA:
                    zero_delta = 0.0
        work[LESS_NONZERO, lane] = delta
        work[LESS_ZERO, lane] = zero_delta
        work[NONZERO, lane] = 0.0
        work[ZERO, lane] = 0.0


@inner
def _refine_perturbation(task, vectors, lanes):
    """Make the perturbation of some lanes smaller, if it can be; return whether that of any is."""
    at, work = task.at, vectors.numbers
    refined = False
    for lane in range(at.lanes):
        nonzero, zero = work[NONZERO, lane], work[ZERO, lane]
        is_large = max(nonzero, zero) * _REFINE > work[LARGEST, lane] * _LEAST_DELTA
        less = _REFINE - 1 if is_large and (lanes >> lane) & 1 else 0.0
        work[LESS_NONZERO, lane] = nonzero * less
        work[LESS_ZERO, lane] = zero * less
        refined |= less != 0
    return refined


@inner
def _add_perturbation(code, task, vectors, shares_address):
    at, work = task.at, vectors.numbers
    call(code.perturb, vectors, shares_address, LESS_ZERO, LESS_NONZERO, 0.0)
    for lane in range(at.lanes):
        work[NONZERO, lane] += work[LESS_NONZERO, lane]
        work[ZERO, lane] += work[LESS_ZERO, lane]
