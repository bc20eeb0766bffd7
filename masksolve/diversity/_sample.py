"""random_mask: uniformly random valid masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from masksolve._inputs import as_count, as_generator
from masksolve._pattern import Pattern
from masksolve._tiles import Margins
from masksolve.diversity._count import States, arrangements, log10_states, pack, steps, unpack

# How many limbs the tables may hold: a few seconds to set up, and 60 MiB to keep.
_LOG10_LIMBS = 6.9


def random_mask(
    n: int,
    m: int,
    size: int | tuple[int, ...] | list[int] | None = None,
    *,
    rng: int | np.random.Generator | None = None,
) -> NDArray[np.bool_]:
    """Return random transposable n:m masks of one m x m tile, all valid masks equally likely.

    Exactly uniform, not only up to rounding, where the masks are counted in a few seconds: all m <= 16, and thin (or
    dense) patterns beyond, up to 4:52. The masks of larger patterns come from a Markov chain whose limit is uniform,
    each from a chain of its own. It starts from a mask whose rows and columns are shuffled and attempts to switch
    2 x 2 rectangles, [[1, 0], [0, 1]] to [[0, 1], [1, 0]] or back, m^2 / (4 d (1 - d)) * ln(1e9 m^2) of them, drawn at
    random, where d = n/m: 28,319 for 16:32.

    Parameters
    ----------
    n, m : int
        The pattern: n entries are **kept** of every m, in every row and every column.
    size : int, or tuple or list of int, optional
        How many masks; None gives one, without a leading axis.
    rng : int or numpy.random.Generator, optional
        A seed, or the generator to draw from. None draws from fresh entropy.

    Returns
    -------
    masks : ndarray of bool, shape (m, m) or (*size, m, m)
        True = kept.

    Raises
    ------
    TypeError
        If n, m or the size is not an integer, or rng neither an integer nor a Generator.
    ValueError
        For a pattern out of range, a negative size or seed.

    References
    ----------
    Miller and Harrison, "Exact sampling and counting for fixed-margin matrices", Annals of Statistics 41, 2013, for
    row-by-row sampling; Kannan, Tetali and Vempala, "Simple Markov-chain algorithms for generating bipartite graphs
    and tournaments", 1999, for the switches.

    Examples
    --------
    >>> mask = random_mask(2, 4, rng=0)
    >>> mask.sum(axis=0), mask.sum(axis=1)
    (array([2, 2, 2, 2]), array([2, 2, 2, 2]))
    >>> random_mask(4, 8, size=(10, 3), rng=0).shape
    (10, 3, 8, 8)
    """
    pattern = Pattern(n, m)
    shape = _shape(size)
    generator = as_generator(rng)
    masks = np.zeros((math.prod(shape), pattern.m, pattern.m), np.bool_)
    kept = min(pattern.kept, pattern.zeros)
    if kept > 0 and len(masks):
        if _is_countable(kept, pattern.m):
            _sample_exactly(masks, kept, generator)
        else:
            _sample_by_switches(masks, kept, generator, switch_attempts(kept, pattern.m))
    if pattern.kept > kept:
        np.logical_not(masks, out=masks)
    return masks.reshape(*shape, pattern.m, pattern.m)


def switch_attempts(n: int, m: int) -> int:
    """Return how many switches the Markov chain attempts for one mask.

    An attempt picks the rectangles of an entry with probability 4 / m^2 and switches it with probability
    d (1 - d), d = n/m, near the limit; after t attempts the entry's memory of its start has faded as
    exp(-4 d (1 - d) t / m^2). The number below takes the memory of all m^2 entries together to 1e-9.
    """
    density = n / m
    return math.ceil(m**2 / (4 * density * (1 - density)) * math.log(1e9 * m**2))


def _is_countable(kept: int, m: int) -> bool:
    """Return whether `_counts` is quick to make and small."""
    states = log10_states(m, m, Margins(kept, True, True))
    return states + math.log10(_limbs(math.comb(m, kept) ** (m - m // 2))) <= _LOG10_LIMBS


def _sample_exactly(masks: NDArray[np.bool_], kept: int, generator: np.random.Generator) -> None:
    # Numba is imported on first use, not with the package.
    from masksolve.diversity._sample_kernels import fill_by_counts

    c = _counts(masks.shape[-1], kept)
    fill_by_counts(generator, c.keys, c.ways, c.starts, c.binomials, c.upper_loads, c.up_to, kept, masks)


def _sample_by_switches(masks: NDArray[np.bool_], kept: int, generator: np.random.Generator, attempts: int) -> None:
    from masksolve.diversity._sample_kernels import switch_rectangles

    m = masks.shape[-1]
    offsets = (np.arange(m)[:, np.newaxis] - np.arange(m)) % m
    for mask in masks:
        rows, columns = generator.permutation(m), generator.permutation(m)
        mask[...] = offsets[rows][:, columns] < kept
        switch_rectangles(generator, mask, attempts)


@dataclass(frozen=True)
class _Counts:
    """The states of `_count.steps` as arrays, and how upper and lower halves of a mask go together.

    Integers of any length are rows of limbs, 32 bits each, the least significant first.
    """

    keys: NDArray[np.uint64]  # (states,), ascending within a step
    ways: NDArray[np.uint32]  # (states, limbs)
    starts: NDArray[np.int64]  # (steps + 2,): where the states of a step begin; the empty mask comes first
    binomials: NDArray[np.uint64]  # (m + 1, kept + 1)
    upper_loads: NDArray[np.int64]  # (histograms, m): the column loads of an upper half
    up_to: NDArray[np.uint32]  # (histograms, limbs): how many masks have an upper half like this or one before it


@lru_cache(maxsize=4)
def _counts(m: int, kept: int) -> _Counts:
    upper_rows, lower_rows = m // 2, m - m // 2
    ways_limbs = _limbs(math.comb(m, kept) ** lower_rows)
    field = m.bit_length()

    keys, ways = [[m << field]], [_as_limbs([1], ways_limbs)]
    halves: dict[int, States] = {0: {m << field: 1}}
    for row, load, states in steps(lower_rows, m, kept, exact_rows=True):
        ascending = sorted(states)
        keys.append(ascending)
        ways.append(_as_limbs([states[state] for state in ascending], ways_limbs))
        if load == 0:
            halves[row + 1] = states

    upper_loads, pairs = [], []
    for state, upper_ways in halves[upper_rows].items():
        loads = unpack(state >> field, m)
        lower_ways = halves[lower_rows].get(pack([kept - load for load in loads], m) << field)
        if lower_ways is not None:
            upper_loads.append(loads)
            pairs.append(upper_ways * lower_ways // arrangements(loads))
    up_to = list(accumulate(pairs))
    return _Counts(
        keys=np.concatenate([np.array(step, np.uint64) for step in keys]),
        ways=np.concatenate(ways),
        starts=np.cumsum([0, *map(len, keys)]),
        binomials=np.array([[math.comb(h, t) for t in range(kept + 1)] for h in range(m + 1)], np.uint64),
        upper_loads=np.array(upper_loads),
        up_to=_as_limbs(up_to, _limbs(up_to[-1])),
    )


def _limbs(number: int) -> int:
    return -(-number.bit_length() // 32)


def _as_limbs(numbers: Sequence[int], limbs: int) -> NDArray[np.uint32]:
    data = b"".join(number.to_bytes(4 * limbs, "little") for number in numbers)
    return np.frombuffer(data, "<u4").astype(np.uint32).reshape(len(numbers), limbs)


def _shape(size: int | tuple[int, ...] | list[int] | None) -> tuple[int, ...]:
    if size is None:
        return ()
    lengths = size if isinstance(size, (tuple, list)) else (size,)
    return tuple(as_count(length, "size", 0) for length in lengths)
