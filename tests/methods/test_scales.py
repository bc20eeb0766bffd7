"""Weights whose bits span more than 64-bit sums hold, and ties at every scale: solved and judged exactly."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import masksolve as ms
from masksolve._methods.exact import solve_importance
from masksolve._tiles import Margins
from tests import oracle

Weights = NDArray[np.float64]
LARGEST, SMALLEST = np.finfo(np.float64).max, 2.0**-1074


def _leading_bits_alike(rng: np.random.Generator, shape: tuple[int, int]) -> Weights:
    """Alike in the leading 48 to 52 of their 53 bits."""
    return np.asarray(1.0 + rng.integers(0, 2 ** int(rng.integers(1, 6)), shape) * 2.0**-52)


def _few_exponents(rng: np.random.Generator, shape: tuple[int, int]) -> Weights:
    """Zeros and small integers at scales that are 30 to 400 bits apart, so that most entries tie at each."""
    exponents = 900 - np.arange(4) * int(rng.integers(30, 400))
    return np.asarray(np.ldexp(rng.integers(0, 3, shape).astype(np.float64), rng.choice(exponents, shape)))


def _sums_of_potentials(rng: np.random.Generator, shape: tuple[int, int]) -> Weights:
    """Sums a + b of a row's and a column's number, for which every mask is as good, and a little in the last bits."""
    a, b = rng.integers(1, 4, (shape[0], 1)), rng.integers(0, 3, shape[1])
    return np.asarray((a + b) * 2.0**40 + rng.integers(0, 3, shape) * 2.0**-10)


def _sums_of_potentials_far_below(rng: np.random.Generator, shape: tuple[int, int]) -> Weights:
    """Those, except where another of them takes over 100 bits or more further down."""
    far_below = np.ldexp(_sums_of_potentials(rng, shape), -int(rng.integers(100, 900)))
    return np.where(rng.random(shape) < 0.4, far_below, _sums_of_potentials(rng, shape))


def _largest_and_smallest(rng: np.random.Generator, shape: tuple[int, int]) -> Weights:
    """Ties near the largest float, and multiples of the smallest: 2098 bits."""
    large = LARGEST * (1 - rng.integers(0, 3, shape) * 2.0**-53)
    return np.where(rng.random(shape) < 0.5, large, rng.integers(0, 4, shape) * SMALLEST)


def _any_bits(rng: np.random.Generator, shape: tuple[int, int]) -> Weights:
    return rng.integers(0, 0x7FF0000000000000, shape).view(np.float64)


FAMILIES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Weights]] = {
    "leading bits alike": _leading_bits_alike,
    "few exponents": _few_exponents,
    "sums of potentials": _sums_of_potentials,
    "sums of potentials far below": _sums_of_potentials_far_below,
    "largest and smallest": _largest_and_smallest,
    "any bits": _any_bits,
}
# Shape, and whether rows and columns hold exactly n: whole tiles, those at the right and at the lower edge of a matrix,
# and at both, with fewer columns than n too.
TILES = [
    ((8, 8), True, True),
    ((8, 8), False, False),
    ((5, 8), True, False),
    ((8, 5), False, True),
    ((6, 7), False, False),
    ((7, 3), False, False),
]


def any_start(rng: np.random.Generator, weights: Weights) -> Weights:
    """Potentials to start from, of which none need make sense."""
    senseless = np.array([np.nan, np.inf, -np.inf, LARGEST, -LARGEST, SMALLEST, -0.0])
    with np.errstate(all="ignore"):
        start = rng.standard_normal(weights.shape[1]) * weights.max()
    return np.where(rng.random(len(start)) < 0.5, rng.choice(senseless, len(start)), start)


def any_mask(rng: np.random.Generator, shape: tuple[int, int], n: int) -> NDArray[np.bool_]:
    """A mask with at most n ones in a line, and mostly n."""
    mask = np.zeros(shape, np.bool_)
    for i, j in rng.permutation(np.argwhere(~mask)):
        mask[i, j] = mask[i].sum() < n and mask[:, j].sum() < n
    return mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("shape", "exact_rows", "exact_columns"), TILES)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 8])
def test_a_tile_is_solved_and_judged_exactly_from_any_start(
    shape: tuple[int, int], exact_rows: bool, exact_columns: bool, n: int, family: str
) -> None:
    rng = np.random.default_rng(n)
    exact = exact_rows, exact_columns
    for _ in range(4):
        weights = FAMILIES[family](rng, shape)
        judged = any_mask(rng, shape, n)
        for _ in range(2):
            found, _, verdict = solve_importance(
                weights[np.newaxis, np.newaxis],
                Margins(n, *exact),
                any_start(rng, weights)[np.newaxis, np.newaxis],
                judged[np.newaxis, np.newaxis],
            )
            assert oracle.is_optimal_tile(weights, found[0, 0], n, *exact)
            assert verdict == oracle.is_optimal_tile(weights, judged, n, *exact)
            # Then, a mask that is nearly optimal, or is.
            judged = found[0, 0].copy()
            rows = rng.integers(0, shape[0], 2)
            judged[rows] = judged[rows[::-1]]


@pytest.mark.parametrize(("shape", "exact_rows", "exact_columns"), TILES)
def test_a_tile_is_solved_from_what_is_no_mask(shape: tuple[int, int], exact_rows: bool, exact_columns: bool) -> None:
    rng = np.random.default_rng(3)
    for n in (1, 3, 5):
        weights = rng.integers(0, 4, shape).astype(np.float64)
        start, given = any_start(rng, weights), rng.random(shape) < 0.7
        found, *_ = solve_importance(
            weights[np.newaxis, np.newaxis],
            Margins(n, exact_rows, exact_columns),
            start[np.newaxis, np.newaxis],
            given[np.newaxis, np.newaxis],
        )
        assert oracle.is_optimal_tile(weights, found[0, 0], n, exact_rows, exact_columns)


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
@pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 5), (3, 8), (7, 13)])
def test_a_matrix_is_solved_and_certified_exactly_up_to_its_ragged_edges(
    n: int, m: int, family: str, saturated: bool, direction: str
) -> None:
    rng = np.random.default_rng(1)
    weights = FAMILIES[family](rng, (2 * m + 1, 2 * m - 1))
    options: dict[str, Any] = {"saturated": saturated, "direction": direction}
    mask = ms.solve_matrix(weights, n, m, **options)
    assert oracle.is_optimal(weights, mask, n, m, saturated, direction)
    found = ms.certify(weights, mask, n, m, **options)
    assert found.optimal
    assert found.gap == 0
    if direction == "both":
        mask[:m] = mask[:m][::-1]
        expected = oracle.is_optimal(weights, mask, n, m, saturated)
        assert ms.certify(weights, mask, n, m, **options).optimal == expected


@pytest.mark.parametrize("length", range(2, 9))
def test_leading_bits_decide_no_entry_that_the_bits_below_them_change(length: int) -> None:
    """A large weight moves the place where bits are cut: a cycle loses above that place, and gains more below it."""
    rng = np.random.default_rng(2)
    best = np.roll(np.eye(length, dtype=bool), 1, axis=1)
    for large in range(1, 60):
        cut_bits = int(rng.integers(4, 8))
        unit = 2.0 ** (cut_bits - 52)
        weights = np.zeros((length + 1, length + 1))
        weights[0, 0] = 2.0**large
        tile = np.where(best, 1 + unit - 2.0**-52, np.where(np.eye(length), 1.0, 0.5))
        # All cut bits are set in the best entries: together they gain nearly a unit each.
        tile[0, 0] += (length - 1) * unit
        weights[1:, 1:] = tile[:, rng.permutation(length)]
        for start in (np.zeros(length + 1), rng.standard_normal(length + 1) * unit, any_start(rng, weights)):
            found, *_ = solve_importance(
                weights[np.newaxis, np.newaxis], Margins(1, True, True), start[np.newaxis, np.newaxis]
            )
            assert oracle.is_optimal_tile(weights, found[0, 0], 1)


@pytest.mark.parametrize("m", [2, 5, 8])
def test_no_bit_is_lost_wherever_the_bits_are_cut(m: int) -> None:
    # The last bit of one weight decides, at every place that it can have below the largest weights.
    for gap in range(160):
        tile = np.full((m, m), 2.0**gap)
        tile[:, 0] = 1.0
        for best in range(m):
            weights = tile.copy()
            weights[best, 0] += 2.0**-52
            masks, _, _ = solve_importance(weights[np.newaxis, np.newaxis], Margins(1, True, True))
            assert masks[0, 0, best, 0], (gap, best)
