"""Laws of every mask of the default method, whatever the weights."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

import masksolve as ms
from tests import oracle, strategies
from tests.strategies import LAYOUTS, Problem
from tests.tables import FAMILIES, TINY_PATTERNS, Pair, name_of, patterns_and_families, weights_of

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])


def best(weights: NDArray[Any], n: int, m: int, saturated: bool) -> Fraction:
    return oracle.kept(weights, ms.solve_block(weights, n, m, saturated=saturated))


@READINGS
@pytest.mark.parametrize(("pattern", "family"), patterns_and_families(one_in=2))
def test_the_mask_is_valid_and_optimal_for_every_pattern_and_family(
    pattern: Pair, family: str, saturated: bool
) -> None:
    n, m = pattern
    tiles = 1 if m > 16 else 4
    weights = weights_of(family, (m, tiles * m))
    mask = ms.solve_matrix(weights, n, m, saturated=saturated)
    assert mask.dtype == np.bool_
    assert oracle.is_optimal(weights, mask, n, m, saturated)


@given(strategies.tiles())
def test_the_mask_of_any_block_is_valid_and_optimal(problem: Problem) -> None:
    weights, n, m, saturated = problem
    mask = ms.solve_block(weights, n, m, saturated=saturated)
    assert oracle.is_optimal_tile(weights, mask, n, saturated, saturated)


@given(strategies.tiles(patterns=st.sampled_from(TINY_PATTERNS)))
def test_no_mask_of_a_tiny_block_keeps_more(problem: Problem) -> None:
    weights, n, m, saturated = problem
    assert best(weights, n, m, saturated) == oracle.best_by_enumeration(weights, n, saturated, saturated)


@given(strategies.matrices(), strategies.directions)
def test_the_mask_of_any_matrix_is_valid_and_optimal_up_to_its_ragged_edges(problem: Problem, direction: str) -> None:
    weights, n, m, saturated = problem
    mask = ms.solve_matrix(weights, n, m, saturated=saturated, direction=direction)
    assert mask.shape == weights.shape
    assert oracle.is_optimal(weights, mask, n, m, saturated, direction)


@pytest.mark.slow
@READINGS
@pytest.mark.parametrize("pattern", [(n, m) for m in range(1, 25) for n in range(m + 1)], ids=name_of)
def test_every_pattern_up_to_24_is_solved_to_the_optimum(pattern: Pair, saturated: bool) -> None:
    n, m = pattern

    def is_optimal(family: str) -> bool:
        weights = weights_of(family, (m + m // 2, m), seed=n)
        return oracle.is_optimal(weights, ms.solve_matrix(weights, n, m, saturated=saturated), n, m, saturated)

    assert [family for family in ("gaussian float32", "uint8", "near ties") if not is_optimal(family)] == []


@pytest.mark.slow
@READINGS
@pytest.mark.parametrize("n", [0, 1, 2, 21, 32, 50, 63, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_of_64_are_solved_to_the_optimum(family: str, n: int, saturated: bool) -> None:
    weights = weights_of(family, (64, 64))
    mask = ms.solve_block(weights, n, 64, saturated=saturated)
    assert oracle.is_optimal_tile(weights, mask, n, saturated, saturated)


@given(strategies.tiles(), st.randoms(use_true_random=False))
def test_transposing_or_shuffling_a_block_leaves_the_kept_importance_alone(problem: Problem, random: Any) -> None:
    weights, n, m, saturated = problem
    rows, columns = random.sample(range(m), m), random.sample(range(m), m)
    kept = best(weights, n, m, saturated)
    assert best(weights.T, n, m, saturated) == kept
    assert best(weights[rows][:, columns], n, m, saturated) == kept


@given(strategies.tiles(), st.integers(-900, 900))
def test_scaling_by_a_power_of_two_scales_the_kept_importance(problem: Problem, exponent: int) -> None:
    weights, n, m, saturated = problem
    weights = weights.astype(np.float64)
    with np.errstate(all="ignore"):
        scaled = np.ldexp(weights, exponent)
    if (np.ldexp(scaled, -exponent) == weights).all():
        assert best(scaled, n, m, saturated) == Fraction(2) ** exponent * best(weights, n, m, saturated)


@given(strategies.tiles())
def test_signs_do_not_matter(problem: Problem) -> None:
    weights, n, m, saturated = problem
    weights = weights.astype(np.float64)
    mask = ms.solve_block(weights, n, m, saturated=saturated)
    assert (ms.solve_block(-weights, n, m, saturated=saturated) == mask).all()
    assert (ms.solve_block(abs(weights), n, m, saturated=saturated) == mask).all()


@given(strategies.tiles(), st.data())
def test_a_larger_weight_never_lowers_the_kept_importance(problem: Problem, data: st.DataObject) -> None:
    weights, n, m, saturated = problem
    i, j = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, m - 1))
    larger = weights.astype(np.float64)
    larger[i, j] = 2 * abs(larger[i, j]) if abs(larger[i, j]) < 1e300 else larger[i, j]
    assert best(larger, n, m, saturated) >= best(weights, n, m, saturated)


@given(strategies.tiles())
def test_at_most_n_keeps_no_less_than_exactly_n(problem: Problem) -> None:
    weights, n, m, _ = problem
    assert best(weights, n, m, saturated=False) >= best(weights, n, m, saturated=True)


def test_at_most_n_keeps_strictly_more_on_this_tile() -> None:
    weights = np.array([[0, 1, 1], [0, 1, 1], [0, 0, 0]])
    assert best(weights, 2, 3, saturated=True) == oracle.best_by_enumeration(weights, 2, True, True) == 3
    assert best(weights, 2, 3, saturated=False) == oracle.best_by_enumeration(weights, 2, False, False) == 4


@given(strategies.matrices(), strategies.directions, strategies.layouts)
def test_the_layout_in_memory_changes_nothing_but_which_of_equal_masks_is_found(
    problem: Problem, direction: str, layout: str
) -> None:
    weights, n, m, saturated = problem
    laid_out = LAYOUTS[layout](weights)
    mask = ms.solve_matrix(laid_out, n, m, saturated=saturated, direction=direction)
    expected = ms.solve_matrix(weights, n, m, saturated=saturated, direction=direction)
    if layout in ("Fortran", "transposed"):
        # Solved as they lie, as the transpose.
        importance = np.abs(weights.astype(np.float64))
        assert ms.certify(weights, mask, n, m, saturated=saturated, direction=direction).optimal
        assert importance[mask].sum() == pytest.approx(importance[expected].sum())
    else:
        assert (mask == expected).all()


@given(strategies.patterns, strategies.readings, st.data())
def test_broadcast_arrays_are_taken(pattern: Pair, saturated: bool, data: st.DataObject) -> None:
    n, m = pattern
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=9))
    line = data.draw(strategies.arrays((*shape[:-2], 1, shape[-1])))
    weights = np.broadcast_to(line, shape)
    assert oracle.is_optimal(weights, ms.solve_matrix(weights, n, m, saturated=saturated), n, m, saturated)


@pytest.mark.parametrize("method", ms.available_methods())
@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_the_input_is_never_written_to(method: str, direction: str) -> None:
    weights = weights_of("student-t", (2, 7, 10))
    before = weights.copy()
    mask = ms.solve_matrix(weights, 1, 4, method=method, direction=direction)
    ms.certify(weights, mask, 1, 4, direction=direction)
    ms.check_mask(mask, 1, 4, direction=direction)
    assert (weights == before).all()
    assert not np.shares_memory(mask, weights)


@given(strategies.matrices())
def test_weights_and_masks_given_to_any_function_stay_as_they_were(problem: Problem) -> None:
    weights, n, m, saturated = problem
    before = weights.tobytes()
    assume(np.abs(weights.astype(np.float64)).max() < 1e300)
    mask = ms.solve_matrix(weights, n, m, saturated=saturated)
    mask_before = mask.tobytes()
    ms.certify(weights, mask, n, m, saturated=saturated)
    ms.check_mask(mask, n, m, saturated=saturated)
    assert (weights.tobytes(), mask.tobytes()) == (before, mask_before)


@pytest.mark.parametrize("method", ["exact", "greedy", "two-approx"])
@pytest.mark.parametrize("family", ["gaussian float32", "uint8", "near ties"])
@pytest.mark.parametrize("threads", [1, 2, 3, None])
def test_the_mask_depends_neither_on_threads_nor_on_the_call(method: str, family: str, threads: int | None) -> None:
    # More tiles than one thread takes at a time, and ragged edges.
    weights = weights_of(family, (483, 409))
    first = ms.solve_matrix(weights, 2, 5, method=method, threads=1)
    assert (ms.solve_matrix(weights, 2, 5, method=method, threads=threads) == first).all()


@pytest.mark.parametrize("family", ["gaussian float32", "half zero", "uint8", "near ties", "all magnitudes"])
@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 6), (5, 8)], ids=name_of)
@READINGS
def test_every_block_of_a_batch_keeps_what_it_keeps_alone(family: str, pattern: Pair, saturated: bool) -> None:
    n, m = pattern
    # Enough for passes in which slow tiles are put off.
    blocks = weights_of(family, (137, m, m))
    masks = ms.solve_blocks(blocks, n, m, saturated=saturated)
    for block, mask in zip(blocks, masks, strict=True):
        assert oracle.kept(block, mask) == best(block, n, m, saturated)
    assert (ms.solve_matrix(blocks, n, m, saturated=saturated) == masks).all()


@given(strategies.matrices())
def test_leading_dimensions_are_a_stack_of_matrices(problem: Problem) -> None:
    weights, n, m, saturated = problem
    stack = np.stack([weights, weights[..., ::-1, :]])
    masks = ms.solve_matrix(stack, n, m, saturated=saturated)
    for matrix, mask in zip(stack, masks, strict=True):
        # Of several optimal masks, another may be found in other company.
        expected = ms.certify(matrix, ms.solve_matrix(matrix, n, m, saturated=saturated), n, m, saturated=saturated)
        found = ms.certify(matrix, mask, n, m, saturated=saturated)
        assert found.optimal
        assert found.kept == pytest.approx(expected.kept)


@pytest.mark.parametrize("method", ["exact", "greedy", "two-approx", "flow", "lp"])
@given(problem=strategies.matrices(), direction=strategies.directions)
def test_keeping_none_and_keeping_all_are_trivial(problem: Problem, direction: str, method: str) -> None:
    weights, _, m, saturated = problem
    options: dict[str, Any] = {"method": method, "saturated": saturated, "direction": direction}
    assert not ms.solve_matrix(weights, 0, m, **options).any()
    assert ms.solve_matrix(weights, m, m, **options).all()


def test_lists_are_taken_as_numpy_takes_them() -> None:
    assert ms.solve_block([[1, 2], [4, 1]], 1, 2).tolist() == [[False, True], [True, False]]
    assert ms.solve_matrix([[0.5, -3]], 1, 2, direction="rows").tolist() == [[False, True]]
