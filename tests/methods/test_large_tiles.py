"""Tiles of more than 64x64, whose rows take more than one word of bits, and those that are solved one at a time."""

from __future__ import annotations

import numpy as np
import pytest

import masksolve as ms
from masksolve._methods import exact
from masksolve._methods.exact import solve_importance
from masksolve._tiles import Margins
from tests.tables import Pair, Weights, name_of, weights_of

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
SOME_FAMILIES = ["gaussian float32", "int8", "half zero", "nearly all zero", "constant", "near ties", "equal rows"]


def are_optimal(tiles: Weights, masks: Weights, margins: Margins) -> bool:
    """Whether masks are optimal, as the solver in integers judges them."""
    _, _, verdict = solve_importance(abs(tiles.astype(np.float64)), margins, given=masks)
    return bool(verdict.all())


@READINGS
@pytest.mark.parametrize("family", SOME_FAMILIES)
@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param((1, 65), marks=pytest.mark.slow),
        (33, 66),
        pytest.param((90, 97), marks=pytest.mark.slow),
        pytest.param((64, 128), marks=pytest.mark.slow),
    ],
    ids=name_of,
)
def test_large_tiles_and_partial_ones_get_optimal_masks(pattern: Pair, family: str, saturated: bool) -> None:
    n, m = pattern
    for rows, cols in ((m, m), (m - 1, m), (m, max(n + 1, m - 30)), (m - 1, max(n + 1, 64))):
        margins = Margins(n, saturated and cols == m, saturated and rows == m, m)
        tiles = weights_of(family, (3 * rows, cols)).reshape(1, 3, rows, cols)
        masks = np.zeros(tiles.shape, np.bool_)
        exact.solve(tiles, masks, margins, threads=1)
        assert are_optimal(tiles, masks, margins), (rows, cols)


@READINGS
def test_masks_of_large_tiles_are_certified(saturated: bool) -> None:
    weights = weights_of("gaussian float32", (200, 140))
    mask, potentials = ms.solve_matrix(weights, 33, 66, saturated=saturated, return_potentials=True)
    assert potentials.shape == (3, 2, 66)
    assert ms.certify(weights, mask, 33, 66, saturated=saturated).optimal
    assert (ms.solve_matrix(weights, 33, 66, saturated=saturated, potentials=potentials) == mask).all()


def test_a_tile_that_takes_long_is_solved_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []

    def solve_tiles(*arguments: object) -> bool:
        called.append(exact_solve_tiles(*arguments))
        return called[-1]

    exact_solve_tiles = exact.solve_tiles
    monkeypatch.setattr(exact, "solve_tiles", solve_tiles)
    tiles = weights_of("gaussian float64", (300, 300))[np.newaxis, np.newaxis]
    margins = Margins(100, True, True)
    masks, _, optimal = solve_importance(abs(tiles), margins)
    # Between two calls an interrupt is honoured.
    assert called.count(True) == 1
    assert called.count(False) > 1
    assert optimal.all()
    assert are_optimal(tiles, masks, margins)
