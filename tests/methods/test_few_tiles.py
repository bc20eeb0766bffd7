"""Calls for few weights, which are copied to where the last call of their kind had its own: as all others."""

from __future__ import annotations

import numpy as np
import pytest

import masksolve as ms
from masksolve._methods import exact
from tests.tables import FAMILIES, PATTERNS, Pair, name_of, weights_of

SMALL = [(n, m) for n, m in PATTERNS if 0 < n < m <= 32]


@pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
@pytest.mark.parametrize("pattern", SMALL, ids=name_of)
def test_masks_are_those_of_weights_that_are_solved_where_they_lie(
    pattern: Pair, saturated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m = pattern
    for family in FAMILIES if m <= 8 else ("gaussian float32", "int8", "half zero"):
        for shape in ((m, m), (3, m, m), (2 * m + 1, 3 * m)):
            weights = weights_of(family, shape)
            few = ms.solve_matrix(weights, n, m, saturated=saturated)
            with monkeypatch.context() as none_are_few:
                none_are_few.setattr(exact, "_FEW_WEIGHTS", 0)
                expected = ms.solve_matrix(weights, n, m, saturated=saturated)
            assert np.array_equal(few, expected), (family, shape)


def test_calls_of_many_kinds_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(200):
        n, m = [(1, 2), (3, 4), (2, 5), (3, 8)][rng.integers(4)]
        shape = (m, int(rng.integers(1, 4)) * m)
        weights = rng.standard_normal(shape).astype([np.float32, np.float64][rng.integers(2)])
        saturated = bool(rng.integers(2))
        given = weights.copy()
        seen.append((weights, n, m, saturated, ms.solve_matrix(weights, n, m, saturated=saturated)))
        assert np.array_equal(weights, given)
    assert len({(mask.shape, n, m, saturated, weights.dtype) for weights, n, m, saturated, mask in seen}) > 20
    for weights, n, m, saturated, mask in seen:
        assert ms.certify(weights, mask, n, m, saturated=saturated).optimal


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_call_that_is_refused_leaves_nothing_behind(value: float) -> None:
    weights = weights_of("gaussian float32", (8, 8))
    expected = ms.solve_block(weights, 4, 8)
    wrong = weights.copy()
    wrong[3, 5] = value
    with pytest.raises(ValueError, match=rf"weights\[3, 5\] is {value}"):
        ms.solve_block(wrong, 4, 8)
    with pytest.raises(ValueError, match="integers beyond"):
        ms.solve_block(np.full((8, 8), 2**60), 4, 8)
    assert np.array_equal(ms.solve_block(weights, 4, 8), expected)
