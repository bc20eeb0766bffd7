"""Kernels of `random_mask`: back through the states that count masks, and the Markov chain of 2 x 2 switches.

Long integers are rows of 32-bit limbs, the least significant first, so that every decision is exact. Random bits
come from `Generator.random`, a multiple of 2**-53, which compiled code draws eight times as fast as integers.
"""

import numpy as np

from masksolve._jit import inner_kernel, kernel

_LIMB = np.uint64(32)
_LIMB_MASK = np.uint64(0xFFFFFFFF)
_TWO_TO_THE_32 = 4294967296.0


@kernel
def fill_by_counts(rng, keys, ways, starts, binomials, upper_loads, up_to, kept, masks):
    """Fill masks (B, m, m), all False, each with one of all `kept`:m masks, equally likely."""
    m = masks.shape[1]
    draw = np.empty(up_to.shape[1], np.uint64)
    loads = np.empty(m, np.int64)
    for mask in masks:
        _draw_below(rng, up_to[-1], draw)
        low, high = 0, len(up_to) - 1
        while low < high:
            middle = (low + high) // 2
            if _is_less(draw, up_to[middle]):
                high = middle
            else:
                low = middle + 1
        for j in range(m):
            other = _draw_index(rng, j + 1)
            loads[j] = loads[other]
            loads[other] = upper_loads[low, j]
        lower_loads = kept - loads
        _fill_half(rng, keys, ways, starts, binomials, kept, loads, mask[: m // 2])
        _fill_half(rng, keys, ways, starts, binomials, kept, lower_loads, mask[m // 2 :])


@inner_kernel
def _fill_half(rng, keys, ways, starts, binomials, kept, loads, rows):
    """Fill rows whose columns have to sum to `loads`, from the last one up; `loads` is used up.

    A state is left by one of the steps that lead into it, each as likely as the share of ways that came by it.
    """
    m = len(loads)
    field = np.uint64(0)
    while m >> field:
        field += np.uint64(1)
    field_mask = (np.uint64(1) << field) - np.uint64(1)
    draw = np.empty(ways.shape[1], np.uint64)
    weight = np.empty(ways.shape[1], np.uint64)
    previous = np.empty(kept + 1, np.int64)

    step = 0
    for row in range(len(rows)):
        step += min(row + 1, kept)
    state = np.uint64(0)
    for load in loads:
        state += np.uint64(1) << field * np.uint64(load + 1)
    here = _find(keys, starts[step], starts[step + 1], state)

    for row in range(len(rows) - 1, -1, -1):
        fullest = min(row, kept - 1)
        for load in range(fullest + 1):
            step -= 1
            at = field * np.uint64(load + 1)
            columns = np.int64(state >> at & field_mask)
            candidates = np.int64(state >> at + field & field_mask)
            to_place = np.int64(state & field_mask)
            take_one = (np.uint64(1) << at + field) - (np.uint64(1) << at) - np.uint64(1)
            if load == fullest:
                # The row starts here, with all its ones yet to place.
                taken = kept - to_place
                state -= np.uint64(taken) * take_one + np.uint64(kept)
                here = _find(keys, starts[step], starts[step + 1], state)
            else:
                possible = 0
                for taken in range(min(candidates, kept - to_place) + 1):
                    before = state - np.uint64(taken) * take_one
                    previous[taken] = _find(keys, starts[step], starts[step + 1], before)
                    possible += previous[taken] >= 0
                if possible > 1:
                    _draw_below(rng, ways[here], draw)
                taken = 0
                while True:
                    if previous[taken] >= 0:
                        if possible == 1:
                            break
                        _multiply(ways[previous[taken]], binomials[columns + taken, taken], weight)
                        if _is_less(draw, weight):
                            break
                        _subtract(draw, weight)
                    taken += 1
                here = previous[taken]
                state -= np.uint64(taken) * take_one

            j = 0
            while taken > 0:
                if loads[j] == load + 1:
                    if _draw_index(rng, candidates) < taken:
                        rows[row, j] = True
                        loads[j] -= 1
                        taken -= 1
                    candidates -= 1
                j += 1


@inner_kernel
def _find(keys, start, stop, key):
    """Return where a key is in keys[start:stop], which ascend; -1 if it is not."""
    low, high = start, stop
    while low < high:
        middle = (low + high) // 2
        if keys[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low if low < stop and keys[low] == key else -1


@inner_kernel
def _draw_bits(rng):
    return np.uint64(rng.random() * _TWO_TO_THE_32)


@inner_kernel
def _draw_index(rng, length):
    """Draw uniformly from range(length), length < 2**32, by Lemire's multiplication."""
    product = _draw_bits(rng) * np.uint64(length)
    if product & _LIMB_MASK < np.uint64(length):
        biased = (_LIMB_MASK + np.uint64(1)) % np.uint64(length)
        while product & _LIMB_MASK < biased:
            product = _draw_bits(rng) * np.uint64(length)
    return np.int64(product >> _LIMB)


@inner_kernel
def _draw_below(rng, bound, draw):
    """Make `draw` uniform below `bound`, which is not 0: random bits until they are less."""
    top = len(bound) - 1
    while bound[top] == 0:
        draw[top] = 0
        top -= 1
    bits = np.uint64(bound[top])
    for shift in (1, 2, 4, 8, 16):
        bits |= bits >> np.uint64(shift)
    while True:
        for limb in range(top + 1):
            draw[limb] = _draw_bits(rng)
        draw[top] &= bits
        if _is_less(draw, bound):
            return


@inner_kernel
def _is_less(a, b):
    for limb in range(len(a) - 1, -1, -1):
        if a[limb] != b[limb]:
            return a[limb] < b[limb]
    return False


@inner_kernel
def _multiply(a, factor, product):
    carry = np.uint64(0)
    for limb in range(len(a)):
        carry += np.uint64(a[limb]) * np.uint64(factor)
        product[limb] = carry & _LIMB_MASK
        carry >>= _LIMB


@inner_kernel
def _subtract(a, b):
    """Subtract b, which is not greater, from a."""
    borrow = np.uint64(0)
    for limb in range(len(a)):
        difference = a[limb] - b[limb] - borrow
        a[limb] = difference & _LIMB_MASK
        borrow = difference >> np.uint64(63)


@kernel
def switch_rectangles(rng, mask, attempts):
    """Pick random 2 x 2 rectangles of a mask, and switch those that hold ones on one diagonal only."""
    m = len(mask)
    for _ in range(attempts):
        top, left = _draw_index(rng, m), _draw_index(rng, m)
        bottom, right = _draw_index(rng, m - 1), _draw_index(rng, m - 1)
        bottom += bottom >= top
        right += right >= left
        diagonal, other = mask[top, left], mask[top, right]
        if diagonal != other and mask[bottom, right] == diagonal and mask[bottom, left] == other:
            mask[top, left] = mask[bottom, right] = other
            mask[top, right] = mask[bottom, left] = diagonal
