"""Column potentials that a call returns, and what a later call makes of them."""

from __future__ import annotations

import numpy as np
import pytest

import masksolve as ms
from masksolve._certificate import certified_regions
from masksolve._judge import grid
from tests.tables import Pair, name_of, weights_of

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
SOME_PATTERNS = pytest.mark.parametrize("pattern", [(2, 4), (3, 8)], ids=name_of)


@SOME_PATTERNS
def test_a_warm_start_of_unchanged_weights_takes_no_rounds(pattern: Pair) -> None:
    n, m = pattern
    weights = weights_of("gaussian float32", (16 * m, 16 * m))
    mask, potentials = ms.solve_matrix(weights, n, m, return_potentials=True)
    again, unmoved = ms.solve_matrix(weights, n, m, potentials=potentials, return_potentials=True)
    assert (again == mask).all()
    # A round would have moved them.
    assert (unmoved == potentials).all()


@READINGS
@SOME_PATTERNS
@pytest.mark.parametrize("family", ["gaussian float32", "half zero", "uint8", "near ties"])
def test_the_mask_does_not_depend_on_whether_potentials_are_returned(
    pattern: Pair, family: str, saturated: bool
) -> None:
    n, m = pattern
    weights = weights_of(family, (24 * m, 24 * m))
    mask, _ = ms.solve_matrix(weights, n, m, saturated=saturated, return_potentials=True)
    assert (ms.solve_matrix(weights, n, m, saturated=saturated) == mask).all()


@pytest.mark.parametrize("constants", [3, 32, 64])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
def test_potentials_prove_masks_that_are_the_only_ones_and_masks_of_constant_tiles(
    constants: int, warm: bool, saturated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = weights_of("gaussian float32", (64, 8, 8))
    tiles[:constants] = np.arange(constants)[:, np.newaxis, np.newaxis]
    start = np.random.default_rng(0).standard_normal((64, 1, 1, 8)) if warm else None
    masks, found = ms.solve_matrix(tiles, 3, 8, saturated=saturated, potentials=start, return_potentials=True)
    # Nothing is left to the integers.
    monkeypatch.delattr(grid, "_judge_by_paths")
    pattern = ms.Pattern(3, 8)
    ((_, verdicts),) = certified_regions(tiles, masks, pattern, "both", saturated, 0, potentials=found)
    assert verdicts.optimal.all()
