"""Tiles that once got a mask that was not optimal: ties at the ends of float64, and warm starts that prove too much."""

from __future__ import annotations

import numpy as np
import pytest

import masksolve as ms
from tests import oracle


@pytest.mark.parametrize(("n", "m"), [(4, 8), (2, 5), (5, 8), (1, 2)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
def test_a_warm_start_of_the_other_reading_never_changes_how_much_is_kept(
    n: int, m: int, sign: int, saturated: bool
) -> None:
    rng = np.random.default_rng(0)
    w = ((1000 + rng.integers(0, 10, (200, 400))) * (rng.random((200, 400)) < 0.6)).astype(np.float32)
    _, potentials = ms.solve_matrix(w, n, m, saturated=not saturated, return_potentials=True)
    cold = ms.solve_matrix(w, n, m, saturated=saturated)
    warm = ms.solve_matrix(w, n, m, saturated=saturated, potentials=sign * potentials)
    ms.check_mask(warm, n, m, saturated=saturated)
    assert w[warm].sum(dtype=np.float64) == w[cold].sum(dtype=np.float64)


@pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
def test_ties_near_the_largest_float_are_solved_exactly(saturated: bool) -> None:
    w = np.array(
        [
            [14714297909248, 14734204076032, 0],
            [3794033180672, 19752869167104, 1125899901411302],
            [0, 0, 7323217035264],
        ],
        np.float64,
    )
    batch = np.concatenate([np.ones((16, 3, 3)), np.ldexp(w, 974)[np.newaxis]])
    mask = ms.solve_blocks(batch, 1, 3, saturated=saturated)[-1]
    assert oracle.is_optimal(batch[-1], mask, 1, 3, saturated)


@pytest.mark.parametrize("exponent", [-1074, -1050, -960, -900, 0])
def test_ties_of_the_smallest_floats_are_solved_exactly(exponent: int) -> None:
    w = np.array(
        [
            [11230594780, 11230594781, 0, 11230594761, 11230594755],
            [11230594756, 11230594664, 11230594691, 0, 11230594672],
            [11230594786, 11230594756, 11230594772, 11230594752, 11230594753],
            [11230594787, 0, 11230594712, 0, 0],
            [11230594772, 11230594678, 11230594685, 11230594705, 0],
        ],
        np.float64,
    )
    tile = np.ldexp(w, exponent)
    assert ms.certify(tile, ms.solve_block(tile, 3, 5), 3, 5).optimal


def test_potentials_that_are_returned_are_taken_back() -> None:
    w = np.array([[101, 222, 16770442, 61], [0, 0, 16777213, 80], [0, 0, 160, 0], [69, 0, 167, 150]], np.float32)
    batch = np.concatenate([np.ones((32, 4, 4), np.float32), np.ldexp(w, 104)[np.newaxis]])
    mask, potentials = ms.solve_matrix(batch, 1, 4, return_potentials=True)
    assert np.isfinite(potentials).all()
    again = ms.solve_matrix(batch, 1, 4, potentials=potentials)
    assert (mask[-1] == again[-1]).all()
    ms.solve_matrix(batch, 1, 4, potentials=np.full(potentials.shape, 1e300))


def test_potentials_beyond_the_end_of_float32_are_no_warning() -> None:
    weights = np.zeros((6, 6), np.float32)
    weights[[1, 2, 3, 5], 1] = np.finfo(np.float32).max
    weights[4, 2] = 1.8115095e35
    mask, potentials = ms.solve_matrix(weights, 3, 6, return_potentials=True)
    assert ms.certify(weights, mask, 3, 6).optimal
    assert np.isfinite(potentials).all()
