"""The oracles themselves: against each other, and on masks that are known to be good or bad."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests import oracle
from tests.strategies import saturated_mask


@pytest.mark.parametrize(("n", "m", "count"), [(1, 2, 2), (1, 3, 6), (1, 4, 24), (2, 4, 90), (3, 4, 24), (2, 5, 2040)])
def test_enumeration_finds_as_many_masks_as_oeis_a008300(n: int, m: int, count: int) -> None:
    assert len(set(oracle.all_masks(m, m, n))) == count


def test_a_tile_without_margins_to_reach_has_all_masks_up_to_n() -> None:
    # 1:2, at most one per line: none, one of four, or one of the two diagonals.
    assert len(oracle.all_masks(2, 2, 1, False, False)) == 1 + 4 + 2


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4)).flatmap(
        lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(-4, 4))
    ),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_the_two_oracles_call_the_same_masks_optimal(
    weights: np.ndarray, n: int, exact_rows: bool, exact_columns: bool
) -> None:
    masks = oracle.all_masks(*weights.shape, n, exact_rows, exact_columns)
    if not masks:
        return
    best = oracle.best_by_enumeration(weights, n, exact_rows, exact_columns)
    for mask in map(np.array, masks[:: len(masks) // 40 + 1]):
        is_best = oracle.kept(weights, mask) == best
        assert oracle.is_optimal_tile(weights, mask, n, exact_rows, exact_columns) == is_best


def test_a_mask_worse_by_the_last_bit_is_not_optimal() -> None:
    weights = np.array([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]])
    assert oracle.is_optimal_tile(weights, np.eye(2), 1)
    assert not oracle.is_optimal_tile(weights, 1 - np.eye(2), 1)


def test_a_mask_that_keeps_the_wrong_number_is_not_optimal() -> None:
    zeros = np.zeros((2, 2))
    assert oracle.is_optimal_tile(zeros, zeros, 1, False, False)
    assert not oracle.is_optimal_tile(zeros, zeros, 1)
    assert not oracle.is_optimal_tile(zeros, np.ones((2, 2)), 1, False, False)


def test_dropping_a_one_is_an_exchange_too() -> None:
    weights = np.array([[9, 1], [1, 0]])
    assert not oracle.is_optimal_tile(weights, 1 - np.eye(2), 1, False, False)
    assert oracle.is_optimal_tile(weights, np.array([[1, 0], [0, 0]]), 1, False, False)


def test_a_matrix_is_judged_tile_by_tile_to_its_ragged_edge() -> None:
    weights = np.array([[5, 1, 7], [1, 4, 9]])
    assert oracle.is_optimal(weights, np.array([[1, 0, 0], [0, 1, 1]]), 1, 2)
    assert not oracle.is_optimal(weights, np.array([[1, 0, 1], [0, 1, 0]]), 1, 2)
    assert not oracle.is_optimal(weights, np.array([[1, 0, 0], [0, 1, 0]]), 1, 2)


def test_kept_is_exact() -> None:
    assert oracle.kept(np.array([[-1e30, 1e-30]]), np.ones((1, 2))) == Fraction(1e30) + Fraction(1e-30)


def test_circulant_masks_are_saturated() -> None:
    assert oracle.is_valid(saturated_mask(np.random.default_rng(0), 3, 8), 3, 8)
