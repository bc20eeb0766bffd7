"""Each method against the optimum and against the others."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import masksolve as ms
from tests import oracle, strategies
from tests.strategies import Problem
from tests.tables import (
    APPROXIMATE_METHODS,
    COARSE_FAMILIES,
    EXACT_METHODS,
    FAMILIES,
    FINE_FAMILIES,
    PATTERNS,
    Method,
    Pair,
    name_of,
    weights_of,
)

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
METHODS_AND_PATTERNS = pytest.mark.parametrize(
    ("method", "pattern"),
    [pytest.param(a, b, id=f"{a} {name_of(b)}") for a in EXACT_METHODS for b in PATTERNS if a.can_do(b)],
)

# For each of several methods.
SOME_EXAMPLES = settings().max_examples // 3


def solve(method: Method, weights: Any, n: int, m: int, **options: Any) -> np.ndarray:
    return ms.solve_matrix(weights, n, m, method=method.name, **options, **method.options)


@READINGS
@METHODS_AND_PATTERNS
def test_exact_methods_are_optimal_on_integers_zeros_and_ties(method: Method, pattern: Pair, saturated: bool) -> None:
    n, m = pattern

    def is_optimal(family: str) -> bool:
        weights = weights_of(family, (m, m))
        return oracle.is_optimal(weights, solve(method, weights, n, m, saturated=saturated), n, m, saturated)

    families = ["int8", "uint8"] if method.slow or m > 16 else COARSE_FAMILIES
    assert [family for family in families if not is_optimal(family)] == []


@READINGS
@METHODS_AND_PATTERNS
def test_exact_methods_agree_up_to_what_they_state(method: Method, pattern: Pair, saturated: bool) -> None:
    n, m = pattern

    def agrees(family: str) -> bool:
        weights = weights_of(family, (m, m), seed=1)
        mask = solve(method, weights, n, m, saturated=saturated)
        best = oracle.kept(weights, ms.solve_block(weights, n, m, saturated=saturated))
        shortfall = Fraction(method.resolution) * Fraction(float(abs(weights).max()))
        return oracle.is_valid(mask, n, m, saturated) and best - oracle.kept(weights, mask) <= shortfall

    families = [FINE_FAMILIES[0]] if method.slow or m > 16 else FINE_FAMILIES
    assert [family for family in families if not agrees(family)] == []


@READINGS
@pytest.mark.parametrize("method", EXACT_METHODS, ids=str)
@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_exact_methods_are_optimal_up_to_ragged_edges(method: Method, direction: str, saturated: bool) -> None:
    n, m, shape = (3, 4, (6, 5)) if method.slow else (2, 5, (8, 13))
    weights = weights_of("int8", shape)
    mask = solve(method, weights, n, m, saturated=saturated, direction=direction)
    assert oracle.is_optimal(weights, mask, n, m, saturated, direction)


@pytest.mark.parametrize("method", EXACT_METHODS, ids=str)
@settings(max_examples=SOME_EXAMPLES)
@given(problem=strategies.tiles(patterns=st.sampled_from([(1, 2), (1, 3), (1, 4), (3, 4), (2, 4)])))
def test_exact_methods_agree_on_blocks_of_few_bits(method: Method, problem: Problem) -> None:
    weights, n, m, saturated = problem
    few_bits = np.frexp(weights.astype(np.float64))[0].round(1) * 10
    options: dict[str, Any] = {"method": method.name, "saturated": saturated, **method.options}
    mask = ms.solve_block(few_bits, n, m, **options)
    assert oracle.kept(few_bits, mask) == oracle.best_by_enumeration(few_bits, n, saturated, saturated)


@pytest.mark.slow
@READINGS
@METHODS_AND_PATTERNS
def test_exact_methods_are_valid_on_every_family(method: Method, pattern: Pair, saturated: bool) -> None:
    n, m = pattern

    def is_valid(family: str) -> bool:
        weights = weights_of(family, (m, m), seed=2)
        return oracle.is_valid(solve(method, weights, n, m, saturated=saturated), n, m, saturated)

    assert [family for family in FAMILIES if not is_valid(family)] == []


@given(strategies.tiles())
def test_greedy_is_valid_and_keeps_at_least_half_of_the_at_most_n_optimum(problem: Problem) -> None:
    weights, n, m, _ = problem
    mask = ms.solve_block(weights, n, m, method="greedy")
    optimum = oracle.kept(weights, ms.solve_block(weights, n, m, saturated=False))
    assert oracle.is_valid_tile(mask, n, False, False)
    assert 2 * oracle.kept(weights, mask) >= optimum


@given(strategies.matrices(), strategies.directions)
def test_greedy_stops_only_where_nothing_can_be_added(problem: Problem, direction: str) -> None:
    weights, n, m, saturated = problem
    mask = ms.solve_matrix(weights, n, m, method="greedy", saturated=saturated, direction=direction)
    assert oracle.is_valid(mask, n, m, saturated=False, direction=direction)
    for where, *_ in oracle.tiles(mask.shape, m, saturated, direction):
        tile = mask[where]
        room = (tile.sum(axis=1, keepdims=True) < n) & (tile.sum(axis=0) < n)
        assert tile[room].all()


def greedy_by_hand(weights: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(weights.shape, bool)
    for i, j in sorted(np.ndindex(weights.shape), key=lambda entry: -abs(float(weights[entry]))):
        mask[i, j] = mask[i].sum() < n and mask[:, j].sum() < n
    return mask


@given(strategies.tiles())
def test_greedy_takes_entries_in_descending_order_and_the_first_of_equals(problem: Problem) -> None:
    weights, n, m, _ = problem
    assert (ms.solve_block(weights, n, m, method="greedy") == greedy_by_hand(weights, n)).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=name_of)
@pytest.mark.parametrize("family", ["gaussian float32", "uint8", "all zero", "constant", "all magnitudes"])
def test_greedy_completed_always_fills(family: str, pattern: Pair) -> None:
    n, m = pattern
    weights = weights_of(family, (5 * m + m // 2, 4 * m + m // 3), len(family))
    mask = ms.solve_matrix(weights, n, m, method="greedy", complete=True)
    assert oracle.is_valid(mask, n, m, saturated=True)


@given(strategies.matrices(), strategies.directions)
def test_greedy_completed_fills_any_matrix_and_every_line_that_it_must(problem: Problem, direction: str) -> None:
    weights, n, m, saturated = problem
    mask = ms.solve_matrix(
        weights, n, m, method="greedy", complete=True, saturated=saturated, direction=direction, threads=1
    )
    assert oracle.is_valid(mask, n, m, saturated, direction)


def test_greedy_may_stop_short_and_completing_it_keeps_what_a_full_line_held() -> None:
    weights = np.array([[9, 8, 0], [7, 6, 0], [0, 0, 5]])
    greedy = ms.solve_block(weights, 2, 3, method="greedy")
    assert greedy.astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    completed = ms.solve_block(weights, 2, 3, method="greedy", complete=True)
    assert oracle.is_valid_tile(completed, 2)


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
def test_greedy_completed_fills_lines_of_a_ragged_tile_that_greedy_leaves_short(turned: bool) -> None:
    weights = np.zeros((5, 6))
    weights[:4, :4] = 9 * (1 - np.eye(4))
    tile = weights.T if turned else weights
    assert not oracle.is_valid(ms.solve_matrix(tile, 3, 6, method="greedy"), 3, 6)
    assert oracle.is_valid(ms.solve_matrix(tile, 3, 6, method="greedy", complete=True), 3, 6)


def n_largest(line: np.ndarray, n: int) -> list[int]:
    """Where the n largest of a line are; of equals, the last ones."""
    return sorted(range(len(line)), key=lambda j: (abs(float(line[j])), j))[len(line) - n :]


@given(strategies.tiles())
def test_two_approx_keeps_what_is_among_the_n_largest_of_its_row_and_of_its_column(problem: Problem) -> None:
    weights, n, m, _ = problem
    expected = np.zeros((m, m), bool)
    for i, j in np.ndindex(m, m):
        expected[i, j] = j in n_largest(weights[i], n) and i in n_largest(weights[:, j], n)
    assert (ms.solve_block(weights, n, m, method="two-approx") == expected).all()


def pruned(weights: np.ndarray, mask: np.ndarray) -> Fraction:
    return oracle.kept(weights, ~mask)


@given(strategies.tiles())
def test_two_approx_prunes_at_most_twice_the_optimum(problem: Problem) -> None:
    weights, n, m, _ = problem
    approximate = ms.solve_block(weights, n, m, method="two-approx")
    assert oracle.is_valid_tile(approximate, n, False, False)
    # What must be pruned is least where at least m - n are pruned per line, which is at most n kept.
    optimal = ms.solve_block(weights, n, m, saturated=False)
    assert pruned(weights, approximate) <= 2 * pruned(weights, optimal)


def test_two_approx_prunes_nearly_twice_the_optimum_of_this_tile() -> None:
    weights = np.array([[0, 100, 900], [100, 101, 900], [900, 900, 0]])
    approximate = ms.solve_block(weights, 2, 3, method="two-approx")
    optimal = ms.solve_block(weights, 2, 3)
    assert oracle.is_optimal_tile(weights, optimal, 2)
    assert 2 * 0.95 <= pruned(weights, approximate) / pruned(weights, optimal) <= 2


@pytest.mark.parametrize("method", ["greedy", "two-approx", *map(str, EXACT_METHODS[:3])])
@settings(max_examples=SOME_EXAMPLES)
@given(problem=strategies.matrices())
def test_one_sided_masks_keep_the_n_largest_of_every_group(method: str, problem: Problem) -> None:
    weights, n, m, saturated = problem
    mask = ms.solve_matrix(weights, n, m, method=method, saturated=saturated, direction="rows")
    # Only `exact` tells weights apart that differ by less than the resolution of integers or of tolerances.
    if method not in ("flow", "lp"):
        for where, *_ in oracle.tiles(weights.shape, m, saturated, "rows"):
            group = abs(weights[where].astype(np.float64)).ravel()
            kept = group[mask[where].ravel()]
            # Zeros are worth nothing: at most n may leave them out.
            assert sorted(kept[kept > 0]) == [w for w in sorted(group)[-n:] if w > 0]
    assert oracle.is_valid(mask, n, m, saturated and method != "two-approx", "rows")


@pytest.mark.parametrize("method", APPROXIMATE_METHODS + EXACT_METHODS[:1], ids=str)
@given(problem=strategies.matrices())
def test_rows_of_the_weights_are_columns_of_their_transpose(method: Method, problem: Problem) -> None:
    weights, n, m, saturated = problem
    rows = solve(method, weights, n, m, saturated=saturated, direction="rows")
    columns = solve(method, weights.swapaxes(-1, -2), n, m, saturated=saturated, direction="columns")
    assert oracle.kept(weights, rows) == oracle.kept(weights, columns.swapaxes(-1, -2))
    assert oracle.is_valid(columns, n, m, False, "columns")


@pytest.mark.parametrize("method", APPROXIMATE_METHODS + EXACT_METHODS, ids=str)
def test_a_method_gives_the_same_mask_every_time(method: Method) -> None:
    weights = weights_of("uint8", (3, 8, 9))
    first = solve(method, weights, 1, 4)
    assert all((solve(method, weights, 1, 4, threads=threads) == first).all() for threads in (None, 1, 2))
