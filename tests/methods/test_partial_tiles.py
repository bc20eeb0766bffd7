"""Tiles at ragged edges, which are solved in the lanes of whole ones: fewer rows, fewer columns, or both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import masksolve as ms
from masksolve._methods import exact
from masksolve._methods.exact import solve_importance
from masksolve._tiles import Margins
from tests import oracle
from tests.tables import FAMILIES, PATTERNS, Pair, Weights, name_of, spread, weights_of

# The vector code of each takes LLVM half a second.
SOME_M = (2, 3, 7, 9, 17, 33)
READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
RAGGED = [(n, m) for n, m in PATTERNS if 1 < m <= 16 and n < m]


def shapes_of(n: int, m: int) -> list[Pair]:
    """Shapes of a partial tile: one line less, and half of them, on either side and on both; and with lines as long as
    the n that they may hold, or longer by one.
    """
    sides = sorted({m - 1, (m + 1) // 2, n, min(n + 1, m), 1})
    return [(rows, cols) for rows in (*sides, m) for cols in (*sides, m) if (rows, cols) != (m, m)]


def margins_of(shape: Pair, n: int, m: int, saturated: bool) -> Margins:
    return Margins(n, saturated and shape[1] == m, saturated and shape[0] == m, m)


def solve(tiles: Weights, margins: Margins) -> Weights:
    masks = np.zeros(tiles.shape, np.bool_)
    exact.solve(tiles, masks, margins, threads=1)
    return masks


def are_optimal(tiles: Weights, masks: Weights, margins: Margins) -> bool:
    """Whether masks are optimal, as the solver in integers judges them."""
    _, _, verdict = solve_importance(abs(tiles.astype(np.float64)), margins, given=masks)
    return bool(verdict.all())


@READINGS
@pytest.mark.parametrize(("pattern", "family"), spread(RAGGED, FAMILIES, one_in=3))
def test_partial_tiles_of_every_shape_get_optimal_masks(pattern: Pair, family: str, saturated: bool) -> None:
    n, m = pattern
    for rows, cols in shapes_of(n, m):
        # Enough for a group that is not full, and for one that is known to tie.
        tiles = weights_of(family, (3 * 9 * rows, cols), seed=rows).reshape(3, 9, rows, cols)
        margins = margins_of((rows, cols), n, m, saturated)
        masks = solve(tiles, margins)
        assert are_optimal(tiles, masks, margins), (rows, cols)
        exact_sides = margins.exact_rows, margins.exact_columns
        assert oracle.is_optimal_tile(tiles[2, 8], masks[2, 8], n, *exact_sides), (rows, cols)


@READINGS
@pytest.mark.parametrize("family", ["gaussian float32", "uint8", "half zero", "near ties"])
@pytest.mark.parametrize("m", [m if m in SOME_M else pytest.param(m, marks=pytest.mark.slow) for m in range(2, 34)])
def test_partial_tiles_of_every_m_get_optimal_masks(m: int, family: str, saturated: bool) -> None:
    rng = np.random.default_rng(m)
    n = int(rng.integers(1, m))
    shapes = [(m - 1, m), (m, m - 1), (m - 1, m - 1), (int(rng.integers(1, m + 1)), int(rng.integers(1, m + 1)))]
    for rows, cols in shapes:
        tiles = FAMILIES[family](rng, (10 * rows, cols)).reshape(1, 10, rows, cols)
        margins = margins_of((rows, cols), n, m, saturated)
        assert are_optimal(tiles, solve(tiles, margins), margins), (n, rows, cols)


@READINGS
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 7), (7, 6), (3, 8), (8, 3), (2, 7)])
def test_potentials_that_are_found_prove_masks_of_partial_tiles(shape: Pair, saturated: bool) -> None:
    margins = margins_of(shape, 3, 8, saturated)
    tiles = weights_of("gaussian float32", (32 * shape[0], shape[1])).reshape(4, 8, *shape)
    potentials = np.full((4, 8, shape[1]), np.nan, np.float32)
    masks = np.zeros(tiles.shape, np.bool_)
    exact.solve(tiles, masks, margins, threads=1, potentials=potentials)
    reduced = (abs(tiles) - potentials[:, :, np.newaxis]).astype(np.float64)
    kept, other = np.where(masks, reduced, np.inf).min(3), np.where(masks, -np.inf, reduced).max(3)
    # (1) and (2) of docs/proof.md.
    assert (kept >= other).all()
    if not margins.exact_rows:
        assert (kept >= 0).all()
        assert (other[masks.sum(3) < 3] <= 0).all()
    if not margins.exact_columns:
        assert (potentials >= 0).all()
        assert (potentials[masks.sum(2) < 3] == 0).all()


@READINGS
@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 8), (7, 13)], ids=name_of)
@pytest.mark.parametrize("family", ["gaussian float64", "int8", "half zero", "constant", "all magnitudes"])
def test_ragged_matrices_are_certified(family: str, pattern: Pair, saturated: bool) -> None:
    n, m = pattern
    for rows, cols in ((5 * m - 1, 3 * m + 1), (m // 2 + 1, 9 * m), (9 * m, m // 2 + 1), (m - 1, m - 1)):
        weights = weights_of(family, (rows, cols))
        mask = ms.solve_matrix(weights, n, m, saturated=saturated)
        certificate = ms.certify(weights, mask, n, m, saturated=saturated)
        assert (certificate.optimal, certificate.gap) == (True, 0)


@READINGS
@pytest.mark.parametrize("method", ["flow", "lp", "enumerate"])
@pytest.mark.parametrize("shape", [(3, 3), (3, 4), (4, 3), (2, 3), (3, 1)])
def test_the_other_exact_methods_keep_as_much_of_partial_tiles(shape: Pair, method: str, saturated: bool) -> None:
    if method not in ms.available_methods():
        pytest.skip(f"{method} is not installed")
    for n in (1, 2, 3):
        tiles = weights_of("int8", (30 * shape[0], shape[1]), seed=n)
        stack = tiles.reshape(30, *shape)
        options: dict[str, Any] = {"saturated": saturated}
        masks, others = (ms.solve_matrix(stack, n, 4, method=name, **options) for name in ("exact", method))
        kept = [(abs(stack.astype(int)) * found).sum((1, 2)).tolist() for found in (masks, others)]
        assert kept[0] == kept[1]


@READINGS
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (5, 7), (7, 5), (4, 4), (60, 66), (66, 62), (58, 59)])
def test_constant_partial_tiles_are_filled_as_far_as_they_can_be(shape: Pair, value: float, saturated: bool) -> None:
    n, m = (3, 8) if max(shape) <= 8 else (33, 66)
    for dtype in (np.float32, np.float64):
        tiles = np.full((6, 9, *shape), value, dtype)
        margins = margins_of(shape, n, m, saturated)
        masks = solve(tiles, margins)
        assert are_optimal(tiles, masks, margins)
        if value:
            assert (masks.sum((2, 3)) == n * min(shape)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_that_are_not_finite_are_found_wherever_they_lie_in_a_partial_tile(dtype: type, bad: float) -> None:
    for place in ((0, 0), (2, 4), (4, 2), (4, 4)):
        weights = np.ones((5, 5), dtype)
        weights[place] = bad
        with pytest.raises(ValueError, match=rf"\[{place[0]}, {place[1]}\]"):
            ms.solve_matrix(weights, 1, 4)


def test_what_lies_beyond_a_matrix_is_neither_read_nor_written() -> None:
    around = np.full((32, 48), np.nan, np.float32)
    weights = around[3:26, 5:36]
    weights[...] = weights_of("gaussian float32", weights.shape)
    mask = ms.solve_matrix(weights, 3, 8)
    assert (mask == ms.solve_matrix(weights.copy(), 3, 8)).all()
    assert np.isnan(around).sum() == around.size - weights.size
