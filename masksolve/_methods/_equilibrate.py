"""The exact solver of many tiles at once: equilibration of row and column potentials, one tile in each vector lane.

Given column potentials v, each row prefers the N entries with the largest c - v. Where that puts exactly N into
every column, and in every row the N-th and the (N+1)-th largest differ, the mask is proven to be the only optimum
(DESIGN, "Duality"): rounding is monotone, so a strict order after rounding is one before. The potentials are found
by moving every line's, in turn, to the middle between its N-th and its (N+1)-th largest reduced entry, a bit too
far, and again. No sorting, no branches.

"At most N" is the same with potentials that are not negative, where lines with a potential of zero need not be
full. It is first solved as "exactly N": with t the least column potential, u + t and v - t prove that mask too if
no u + t is negative. Only the other tiles are equilibrated under the clamp.

Tiles go through passes. A group of lanes takes as many rounds as its slowest tile; so in haste, the few that are not
certified when most are, are left to a pass of their own. Tiles that more rounds do not certify go on in float64.
Most of them tie: several masks are optimal, and no order is strict. So they are perturbed, c' = c + p, which makes
the optimum x of c' unique. Let r be the reduced costs of c, without p, by the potentials found for c', and `wrong` the
sum of those that are on the wrong side: below zero in x, above zero outside. No mask y of c beats x by more than
`wrong` (weak duality). So x is optimal for c if

(a) `wrong` is less than the largest power of two that divides all weights, and with them every difference of masks; or
(b) only zeros are on the wrong side, and every other weight lies on the right side by more than `wrong`: a mask y that
    differs from x in more than zeros loses more than it can gain.

Otherwise the perturbation is made smaller, and again. Where zeros abound, "exactly N" is first solved as "at most
N", in which zeros do not tie, and filled up with zeros: nothing is worth more.
"""

import numpy as np

from masksolve._jit import inner_kernel, kernel
from masksolve._methods._vectors import call, lowest_bit, new_work, unpack

# What becomes of a tile that a pass leaves unsolved: it is to be equilibrated as "exactly n" or as "at most n", in the
# dtype of the weights or in float64, perturbed; or by other means.
STAGES = AS_EXACTLY, AS_AT_MOST, TIES_EXACTLY, TIES_AT_MOST, UNSOLVED = 0, 1, 2, 3, 4

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

_WAITS, _SOLVED, _LEFT = 0, 1, 2
# Checks in a row that certify no tile, after which those of a group that are not yet certified are taken to tie.
_PATIENCE = 3
# So many tiles fit into a group or two: none of them is left to a later pass for being slow.
_FEW = 32
# Stages, and whether in haste. The first is that of all tiles; none goes back to an earlier one.
_PASSES = ((AS_EXACTLY, True), (AS_EXACTLY, False), (AS_AT_MOST, True), (AS_AT_MOST, False))


@kernel
def equilibrate(
    program,
    grid,
    tiles,
    start,
    like,
    bits_like,
    rounds,
    relaxations,
    potentials,
    left,
    left_potentials,
    left_stages,
    at_most,
):
    """Solve tiles of a grid; return how many are left, or -1 for weights that are not finite.

    Parameters
    ----------
    program
        `_vectors.program` for numbers of the dtype of the weights.
    grid
        (address of the weights; their strides, in elements, of a tile row, a tile column and a row in a tile;
        address of the masks; the same strides of theirs, in bytes; tiles in a tile row).
    tiles
        (k): where the tiles are, tile row * 2**32 + tile column; to divide would take as long as half the rest.
    start
        (k, m): column potentials to start from; or empty.
    like, bits_like
        Empty arrays of the dtype of the weights, and of the integers that are as wide.
    rounds, relaxations
        (first round that is checked, last round, both where most tiles tie, first that is checked of tiles left), and
        how far potentials move, in units of the way to the middle: (in round 0, more each round, at most, under clamp).
    potentials
        (tiles in the grid, m): where column potentials found are written; or empty.
    left, left_potentials, left_stages
        (k), (k, m), (k): filled with the tiles left, their column potentials, and what next, one of `STAGES`.
    at_most
        Whether lines may hold fewer than n.
    """
    code, clamped, at, n, m = unpack(program)
    lanes = at.lanes
    work = new_work(at, like)
    integers = work.view(bits_like.dtype)
    words = work.view(np.int64)
    state = np.empty(lanes, np.int8)
    memory = np.empty(4 * m, np.int64)
    infinity = 0x7F800000 if like.itemsize == 4 else 0x7FF0000000000000
    some, some_start, count, left_count = tiles, start, len(tiles), 0

    for number in range(4):
        stage, in_haste = _PASSES[number]
        if number > 0:
            if number == 1:
                some, some_start = np.empty(left_count, np.int64), np.empty((left_count, m), like.dtype)
            count = _take(stage, left, left_potentials, left_stages, left_count, some, some_start)
            left_count -= count
        in_haste &= count > _FEW
        as_at_most = stage == AS_AT_MOST
        warm = number > 0 or len(start) > 0
        # Where most tiles tie, rounds are wasted on them.
        mostly_left = 0

        for group in range(0, count, lanes):
            for lane in range(lanes):
                given = min(group + lane, count - 1)
                words[at.offsets * at.words + lane] = _place(some[given], grid[1], grid[2])
                state[lane] = _WAITS if group + lane < count else _SOLVED
                if warm:
                    for j in range(m):
                        work[(at.v + j) * lanes + lane] = some_start[given, j]
            call(code.load, work, grid[0], grid[3], 0, 0.0)
            for k in range(at.u * lanes, (at.v if warm else at.best) * lanes):
                work[k] = 0
            full_of_zeros = 0
            if mostly_left >= 2 and not as_at_most:
                call(code.find_zeros, work, 0, 0, 0, 0.0)
                for lane in range(lanes):
                    full_of_zeros += _is_full_of_zeros(work[at.zeros * lanes + lane], m)
                    largest = integers[at.largest * lanes + lane]
                    if state[lane] == _WAITS and largest == integers[at.least * lanes + lane] and largest < infinity:
                        _store_any(code, at, grid, some[group + lane], work, words, lane, n, m, potentials)
                        state[lane] = _SOLVED
                if _count_waiting(state) == 0:
                    continue
            clamp = as_at_most or 2 * full_of_zeros > lanes
            if clamp:
                if not at_most and full_of_zeros == 0:
                    call(code.find_zeros, work, 0, 0, 0, 0.0)
                if warm:
                    for k in range(at.v * lanes, at.best * lanes):
                        if work[k] < 0:
                            work[k] = 0
            moves = clamped if clamp else code
            ties = mostly_left >= 2 and not clamp
            first_check = rounds[3] if number > 0 else 0 if warm else rounds[2] if ties else rounds[0]
            last = rounds[2] if ties else rounds[1]
            # Halfway leaves the rows their half of what "at most n" shares out.
            step = 0.5 if clamp else 1.0
            fills = clamp and not at_most
            waiting = _count_waiting(state)
            uncertain, stalled = waiting, 0
            for round_ in range(last + 1):
                if round_ > 0 or not warm:
                    call(moves.move_columns, work, 0, 0, 0, step)
                if round_ >= first_check:
                    call(moves.choose, work, 0, 0, 0, 0.0)
                    before, uncertain = uncertain, waiting
                    proven = 0
                    for lane in range(lanes):
                        is_proven = integers[at.strict * lanes + lane] != 0 and work[at.wrong * lanes + lane] == 0
                        if state[lane] == _WAITS and is_proven:
                            proven |= 1 << lane
                            uncertain -= 1
                    stalled = stalled + 1 if uncertain == before else 0
                    is_last = round_ == last or uncertain <= (lanes // 4 if in_haste else 0)
                    is_last |= stalled == _PATIENCE and 4 * uncertain <= 3 * lanes
                    if fills:
                        # To fill takes longer than a round; most that are proven now will be so in the end.
                        if is_last:
                            call(code.fill, work, 0, 0, 0, 0.0)
                        else:
                            proven = 0
                    for lane in range(lanes):
                        if (proven >> lane) & 1:
                            passes = True
                            if fills:
                                passes = integers[at.short * lanes + lane] == 0 or _fill_with_zeros(
                                    words,
                                    at.bits * at.words + lane,
                                    at.zero_bits * at.words + lane,
                                    lanes,
                                    m,
                                    n,
                                    memory,
                                )
                            elif at_most and not clamp:
                                passes = work[at.worst * lanes + lane] > -work[at.lowest * lanes + lane]
                            state[lane] = _SOLVED if passes else _LEFT
                            if passes:
                                lowest = work[at.lowest * lanes + lane] if at_most and not clamp else 0.0
                                _store(code, at, grid, some[group + lane], work, lane, potentials, lowest)
                    if is_last:
                        break
                    waiting = _count_waiting(state)
                step = min(relaxations[2], relaxations[0] + relaxations[1] * round_)
                if clamp:
                    step = relaxations[3]
                elif number > 0:
                    step = relaxations[2]
                call(moves.move_rows, work, 0, 0, 0, step if round_ > 0 else 1.0)

            unsolved = 0
            for lane in range(lanes):
                if integers[at.largest * lanes + lane] >= infinity:
                    return -1
                unsolved += state[lane] != _SOLVED
            if not clamp:
                mostly_left = mostly_left + 1 if 2 * unsolved > lanes else 0
            if unsolved == 0:
                continue
            for lane in range(lanes):
                if state[lane] == _WAITS and integers[at.largest * lanes + lane] == integers[at.least * lanes + lane]:
                    _store_any(code, at, grid, some[group + lane], work, words, lane, n, m, potentials)
                    state[lane] = _SOLVED
            waiting = _count_waiting(state)
            late = in_haste and waiting <= lanes // 4
            if waiting > 0 and not late and not clamp:
                call(code.find_zeros, work, 0, 0, 0, 0.0)
            for lane in range(lanes):
                if state[lane] == _SOLVED:
                    continue
                if state[lane] == _LEFT:
                    next_ = AS_AT_MOST if at_most else TIES_EXACTLY
                elif clamp:
                    next_ = TIES_AT_MOST if as_at_most and not in_haste else AS_AT_MOST
                elif late:
                    next_ = AS_EXACTLY
                else:
                    is_full = _is_full_of_zeros(work[at.zeros * lanes + lane], m)
                    next_ = AS_AT_MOST if is_full else TIES_EXACTLY
                shift = 0.0
                if not clamp and next_ == AS_AT_MOST:
                    # Split what potentials lack for "at most n" evenly between rows and columns.
                    shift = 0.5 * (work[at.lowest * lanes + lane] - work[at.worst * lanes + lane])
                left[left_count] = some[group + lane]
                left_stages[left_count] = next_
                for j in range(m):
                    left_potentials[left_count, j] = work[(at.v + j) * lanes + lane] - shift
                left_count += 1
        if left_count == 0:
            break
    return left_count


@inner_kernel
def _take(stage, tiles, potentials, stages, count, some, some_potentials):
    """Move tiles that wait for a stage from a list to another; close up the others. Return how many are moved."""
    taken = 0
    for k in range(count):
        if stages[k] == stage:
            some[taken] = tiles[k]
            for j in range(potentials.shape[1]):
                some_potentials[taken, j] = potentials[k, j]
            taken += 1
        else:
            tiles[k - taken] = tiles[k]
            for j in range(potentials.shape[1]):
                potentials[k - taken, j] = potentials[k, j]
            stages[k - taken] = stages[k]
    return taken


@kernel
def equilibrate_perturbed(
    program, grid, rounds, relaxation, shares_address, potentials, left, left_potentials, left_stages, at_most
):
    """Solve tiles in float64, perturbed where they tie; return how many are left.

    Parameters
    ----------
    program
        `_vectors.program` for float64.
    rounds
        (first round that is checked, last round, rounds between checks).
    shares_address
        Of (m * m) float64: the perturbation of each entry, between 0 and 1 times what the tile allows.
    left, left_potentials, left_stages
        The tiles, as `equilibrate` leaves them, and then those that are left.

    The other parameters are those of `equilibrate`.
    """
    code, clamped, at, n, m = unpack(program)
    lanes = at.lanes
    work = new_work(at, left_potentials)
    words = work.view(np.int64)
    memory = np.empty(4 * m, np.int64)
    left_count = len(left)
    some, some_start = np.empty(left_count, np.int64), np.empty(left_potentials.shape)

    for number in range(4):
        # Both stages in haste and not; the one that may leave tiles to the other comes first.
        clamp = (number >= 2) == at_most
        stage = TIES_AT_MOST if clamp else TIES_EXACTLY
        moves = clamped if clamp else code
        count = _take(stage, left, left_potentials, left_stages, left_count, some, some_start)
        left_count -= count
        in_haste = number % 2 == 0 and count > _FEW

        for group in range(0, count, lanes):
            in_group = min(lanes, count - group)
            waiting = (1 << in_group) - 1
            for lane in range(lanes):
                given = group + min(lane, in_group - 1)
                words[at.offsets * lanes + lane] = _place(some[given], grid[1], grid[2])
                for j in range(m):
                    work[(at.v + j) * lanes + lane] = max(0.0, some_start[given, j]) if clamp else some_start[given, j]
            call(code.load, work, grid[0], grid[3], 0, 0.0)
            call(code.measure, work, 0, 0, 0, 0.0)
            call(code.find_zeros, work, 0, 0, 0, 0.0)
            for lane in range(lanes):
                top = work[at.largest * lanes + lane]
                quantum = work[at.quantum * lanes + lane]
                smallest = work[at.smallest * lanes + lane]
                delta, zero_delta = 0.0, 0.0
                if _SMALLEST_TOP < top < _LARGEST_TOP:
                    if quantum >= top * _COARSE_GRID:
                        delta = 2 * quantum / m
                    if not clamp and work[at.zeros * lanes + lane] > 0:
                        zero_delta = max(delta, min(top * _ZERO_DELTA, 0.5 * smallest))
                        if zero_delta < top * _LEAST_DELTA:
                            zero_delta = 0.0
                work[at.less_nonzero * lanes + lane] = delta
                work[at.less_zero * lanes + lane] = zero_delta
                work[at.nonzero * lanes + lane] = 0.0
                work[at.zero * lanes + lane] = 0.0
            _add_perturbation(code, at, work, shares_address)

            for k in range(at.u * lanes, at.v * lanes):
                work[k] = 0.0
            for round_ in range(rounds[1] + 1):
                if waiting == 0 or (in_haste and _count_bits(waiting) <= lanes // 4):
                    break
                call(moves.move_rows, work, 0, 0, 0, relaxation if round_ > 0 else 1.0)
                call(moves.move_columns, work, 0, 0, 0, relaxation)
                if round_ < rounds[0] or (round_ - rounds[0]) % rounds[2] != 0:
                    continue
                call(moves.choose, work, 0, 0, 0, 0.0)
                candidates = 0
                for lane in range(lanes):
                    work[at.less_nonzero * lanes + lane] = 0.0
                    work[at.less_zero * lanes + lane] = 0.0
                    if words[at.strict * lanes + lane] != 0:
                        candidates |= waiting & (1 << lane)
                if candidates == 0:
                    continue
                call(moves.weigh, work, shares_address, 0, 0, 0.0)
                if clamp and not at_most:
                    call(code.fill, work, 0, 0, 0, 0.0)
                refine = False
                for lane in range(lanes):
                    if not (candidates >> lane) & 1:
                        continue
                    if not _is_proven(at, work, lane, m):
                        deltas = max(work[at.nonzero * lanes + lane], work[at.zero * lanes + lane])
                        if deltas * _REFINE > work[at.largest * lanes + lane] * _LEAST_DELTA:
                            work[at.less_nonzero * lanes + lane] = work[at.nonzero * lanes + lane] * (_REFINE - 1)
                            work[at.less_zero * lanes + lane] = work[at.zero * lanes + lane] * (_REFINE - 1)
                            refine = True
                        continue
                    waiting &= ~(1 << lane)
                    shift = 0.0
                    passes = True
                    if at_most and not clamp:
                        lack = -work[at.threshold * lanes + lane] - work[at.lowest * lanes + lane]
                        passes = lack < -_ROUNDING * work[at.largest * lanes + lane]
                        shift = work[at.lowest * lanes + lane] + 0.5 * lack
                    elif clamp and not at_most:
                        passes = words[at.short * lanes + lane] == 0 or _fill_with_zeros(
                            words, at.bits * lanes + lane, at.zero_bits * lanes + lane, lanes, m, n, memory
                        )
                    if passes:
                        lowest = work[at.lowest * lanes + lane] if at_most and not clamp else 0.0
                        _store(code, at, grid, some[group + lane], work, lane, potentials, lowest)
                    else:
                        left[left_count] = some[group + lane]
                        left_stages[left_count] = TIES_EXACTLY if clamp else TIES_AT_MOST
                        for j in range(m):
                            left_potentials[left_count, j] = work[(at.v + j) * lanes + lane] - shift
                        left_count += 1
                if refine:
                    _add_perturbation(code, at, work, shares_address)

            for lane in range(in_group):
                if (waiting >> lane) & 1:
                    left[left_count] = some[group + lane]
                    if in_haste:
                        left_stages[left_count] = TIES_AT_MOST if clamp else TIES_EXACTLY
                    else:
                        left_stages[left_count] = TIES_EXACTLY if clamp and not at_most else UNSOLVED
                    for j in range(m):
                        left_potentials[left_count, j] = work[(at.v + j) * lanes + lane]
                    left_count += 1
    return left_count


@inner_kernel
def _add_perturbation(code, at, work, shares_address):
    call(code.perturb, work, shares_address, at.less_zero, at.less_nonzero, 0.0)
    for lane in range(at.words):
        work[at.nonzero * at.words + lane] += work[at.less_nonzero * at.words + lane]
        work[at.zero * at.words + lane] += work[at.less_zero * at.words + lane]


@inner_kernel
def _count_waiting(state):
    count = 0
    for lane in range(len(state)):
        count += state[lane] == _WAITS
    return count


@inner_kernel
def _store(code, at, grid, tile, work, lane, potentials, lowest):
    """Store the mask of a lane, and its column potentials less `lowest`."""
    call(code.store, work, grid[4] + _place(tile, grid[5], grid[6]), grid[7], lane, 0.0)
    if len(potentials) > 0:
        where = _place(tile, grid[8], 1)
        for j in range(potentials.shape[1]):
            potentials[where, j] = work[(at.v + j) * at.lanes + lane] - lowest


@inner_kernel
def _store_any(code, at, grid, tile, work, words, lane, n, m, potentials):
    """Store a mask of a tile whose entries are all the same, and potentials of zero, which prove every such mask."""
    row = (np.int64(1) << n) - 1
    for i in range(m):
        words[at.bits * at.words + i * at.lanes + lane] = row
        # Each row is the one before, turned round by one; bits from m on are not looked at.
        row = (row << 1) | ((row >> (m - 1)) & 1)
        work[(at.v + i) * at.lanes + lane] = 0
    _store(code, at, grid, tile, work, lane, potentials, 0.0)


@inner_kernel
def _count_bits(word):
    count = 0
    while word != 0:
        count += 1
        word &= word - 1
    return count


@inner_kernel
def _is_full_of_zeros(zeros, m):
    return 4 * zeros >= m * m


@inner_kernel
def _place(tile, down, across):
    return (tile >> 32) * down + (tile & 0xFFFFFFFF) * across


@inner_kernel
def _is_proven(at, work, lane, m):
    """Whether a mask that is strictly best for the perturbed tile is proven optimal for the tile itself."""
    top = work[at.largest * at.words + lane]
    wrong = work[at.wrong * at.words + lane]
    if work[at.nonzero * at.words + lane] == 0 and work[at.zero * at.words + lane] == 0:
        return wrong == 0
    for j in range(m):
        if not abs(work[(at.v + j) * at.words + lane]) <= 8 * top:
            return False
    rounding = top * _ROUNDING
    is_clear = work[at.margin * at.words + lane] > 2 * wrong + rounding
    return is_clear or wrong + rounding < work[at.quantum * at.words + lane]


@inner_kernel
def _fill_with_zeros(words, bits, zero_bits, stride, m, n, memory):
    """Fill a mask up to n ones a line with weights of zero, along alternating paths; False if that cannot be done.

    Row i's mask is words[bits + i * stride], and its zeros are words[zero_bits + i * stride]. `memory` holds 4 m
    integers.
    """
    room, reached_by, from_row, queue = 0, m, 2 * m, 3 * m
    for j in range(m):
        memory[room + j] = n
    for i in range(m):
        row = words[bits + i * stride]
        while row != 0:
            memory[room + lowest_bit(row)] -= 1
            row &= row - 1
    has_room = np.int64(0)
    for j in range(m):
        if memory[room + j] > 0:
            has_room |= np.int64(1) << j
    for short in range(m):
        missing = n
        row = words[bits + short * stride]
        while row != 0:
            missing -= 1
            row &= row - 1
        for _ in range(missing):
            for i in range(m):
                memory[reached_by + i] = -1
            memory[queue] = short
            head, tail, end = 0, 1, -1
            seen = np.int64(0)
            while head < tail:
                i = memory[queue + head]
                head += 1
                free = words[zero_bits + i * stride] & ~words[bits + i * stride] & ~seen
                if free & has_room != 0:
                    end = lowest_bit(free & has_room)
                    memory[from_row + end] = i
                    break
                seen |= free
                for k in range(m):
                    given = words[zero_bits + k * stride] & words[bits + k * stride] & free
                    if given != 0 and k != short and memory[reached_by + k] < 0:
                        memory[reached_by + k] = lowest_bit(given)
                        memory[queue + tail] = k
                        tail += 1
                while free != 0:
                    memory[from_row + lowest_bit(free)] = i
                    free &= free - 1
            if end < 0:
                return False
            memory[room + end] -= 1
            if memory[room + end] == 0:
                has_room &= ~(np.int64(1) << end)
            j = end
            while True:
                i = memory[from_row + j]
                words[bits + i * stride] |= np.int64(1) << j
                if i == short:
                    break
                j = memory[reached_by + i]
                words[bits + i * stride] &= ~(np.int64(1) << j)
    return True
