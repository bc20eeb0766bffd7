"""certify, against the oracles."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import masksolve as ms
from masksolve._certificate import TileCertificates, certified_regions
from masksolve._tiles import Direction
from tests import oracle, strategies
from tests.extras import dtype_of
from tests.strategies import Problem, saturated_mask
from tests.tables import (
    APPROXIMATE_METHODS,
    EXACT,
    EXACT_METHODS,
    TINY_PATTERNS,
    Pair,
    name_of,
    patterns_and_families,
    spread,
    weights_of,
)

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])


def sums_fit(weights: np.ndarray) -> bool:
    """Whether sums of the weights stay inside float64."""
    return float(abs(weights.astype(np.float64)).max()) < 1e300


def test_the_certificate_of_a_small_tile() -> None:
    good = ms.certify([[2, 1], [1, 3]], [[1, 0], [0, 1]], 1, 2)
    assert good == ms.Certificate(kept=5.0, upper_bound=5.0, gap=0.0, optimal=True)
    bad = ms.certify([[2, 1], [1, 3]], [[0, 1], [1, 0]], 1, 2)
    assert bad == ms.Certificate(kept=2.0, upper_bound=5.0, gap=0.6, optimal=False)


@READINGS
@pytest.mark.parametrize(("pattern", "family"), patterns_and_families(one_in=3))
def test_every_mask_of_the_exact_method_is_optimal(pattern: Pair, family: str, saturated: bool) -> None:
    n, m = pattern
    weights = weights_of(family, (m + m // 3, 2 * m))
    if not sums_fit(weights):
        weights = weights * 2.0**-40
    found = ms.certify(weights, ms.solve_matrix(weights, n, m, saturated=saturated), n, m, saturated=saturated)
    assert found.optimal
    assert found.gap == 0
    assert found.kept == found.upper_bound


@READINGS
@pytest.mark.parametrize(
    ("method", "family", "pattern"),
    [
        case
        for case in spread(
            EXACT_METHODS,
            ["int8", "uint8", "constant", "all zero", "gaussian float32"],
            [(1, 4), (3, 4), (2, 5), (3, 8)],
            one_in=3,
        )
        if case.values[0].can_do(case.values[2])
    ],
)
def test_every_mask_of_every_exact_method_is_optimal(method: Any, pattern: Pair, family: str, saturated: bool) -> None:
    n, m = pattern
    weights = weights_of(family, (m, m))
    mask = ms.solve_block(weights, n, m, method=method.name, saturated=saturated, **method.options)
    assert ms.certify(weights, mask, n, m, saturated=saturated).optimal


@pytest.mark.parametrize("method", APPROXIMATE_METHODS, ids=str)
@pytest.mark.parametrize("pattern", [(3, 8), (4, 8), (8, 16)], ids=name_of)
@READINGS
def test_masks_of_approximate_methods_are_judged_as_the_oracle_does(
    method: Any, pattern: Pair, saturated: bool
) -> None:
    n, m = pattern
    verdicts = set()
    for block in weights_of("gaussian float32", (10, m, m)):
        mask = ms.solve_block(block, n, m, method=method.name, **method.options)
        verdict = ms.certify(block, mask, n, m, saturated=saturated)
        assert verdict.optimal == oracle.is_optimal_tile(block, mask, n, saturated, saturated)
        verdicts.add(verdict.optimal)
        if saturated and (mask.sum(axis=0) == n).all() and not verdict.optimal:
            assert verdict.gap > 0
    assert False in verdicts


@given(strategies.tiles(), st.integers(0, 2**32 - 1), st.booleans())
def test_any_valid_mask_is_judged_as_the_oracle_does(problem: Problem, seed: int, is_short: bool) -> None:
    weights, n, m, saturated = problem
    assume(sums_fit(weights))
    rng = np.random.default_rng(seed)
    mask = saturated_mask(rng, n, m)
    if is_short:
        mask &= rng.random((m, m)) < 0.8
    found = ms.certify(weights, mask, n, m, saturated=saturated)
    assert found.optimal == oracle.is_optimal_tile(weights, mask, n, saturated, saturated)
    assert found.kept == pytest.approx(float(oracle.kept(weights, mask)), rel=1e-12)


@given(strategies.tiles(), st.data())
def test_an_exchange_in_an_optimal_mask_is_judged_as_the_oracle_does(problem: Problem, data: st.DataObject) -> None:
    weights, n, m, saturated = problem
    assume(sums_fit(weights))
    mask = ms.solve_block(weights, n, m, saturated=saturated)
    i, k = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, m - 1))
    mask[[i, k]] = mask[[k, i]]
    found = ms.certify(weights, mask, n, m, saturated=saturated)
    assert found.optimal == oracle.is_optimal_tile(weights, mask, n, saturated, saturated)


@given(strategies.matrices(), strategies.directions, strategies.layouts)
def test_optimal_masks_of_any_matrix_in_any_layout_and_direction_are_optimal(
    problem: Problem, direction: str, layout: str
) -> None:
    weights, n, m, saturated = problem
    assume(sums_fit(weights))
    mask = ms.solve_matrix(weights, n, m, saturated=saturated, direction=direction)
    laid_out = strategies.LAYOUTS[layout]
    found = ms.certify(laid_out(weights), laid_out(mask), n, m, saturated=saturated, direction=direction)
    assert found.optimal
    assert found.kept == pytest.approx(float(oracle.kept(weights, mask)), rel=1e-12)


@given(strategies.matrices(), strategies.directions)
def test_two_approx_masks_of_any_matrix_are_judged_as_the_oracle_does(problem: Problem, direction: str) -> None:
    weights, n, m, saturated = problem
    assume(sums_fit(weights))
    mask = ms.solve_matrix(weights, n, m, method="two-approx", direction=direction)
    found = ms.certify(weights, mask, n, m, saturated=saturated, direction=direction)
    assert found.optimal == oracle.is_optimal(weights, mask, n, m, saturated, direction)


@given(strategies.tiles(patterns=st.sampled_from(TINY_PATTERNS[1:])))
def test_the_upper_bound_is_the_optimum_whatever_mask_is_judged(problem: Problem) -> None:
    weights, n, m, saturated = problem
    assume(sums_fit(weights))
    masks = oracle.all_masks(m, m, n, saturated, saturated)
    best = float(oracle.best_by_enumeration(weights, n, saturated, saturated))
    for mask in masks[:: len(masks) // 8 + 1]:
        found = ms.certify(weights, mask, n, m, saturated=saturated)
        assert found.upper_bound == pytest.approx(best, rel=1e-12)
        assert found.gap == pytest.approx(0 if best == 0 else 1 - found.kept / best, abs=1e-12)


# Of the potentials of the solve, and of random ones.
CHANGES: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]] = {
    "none": lambda good, drawn: good,
    "sign": lambda good, drawn: -good,
    "random": lambda good, drawn: drawn,
    "huge": lambda good, drawn: 1e30 * drawn,
    "tiny": lambda good, drawn: 1e-300 * drawn,
    "NaN": lambda good, drawn: drawn * np.nan,
    "infinite": lambda good, drawn: drawn * np.inf,
}


@pytest.mark.parametrize("family", ["gaussian float32", "int8", "constant", "all zero", "gaussian float64"])
@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("change", CHANGES)
def test_potentials_prove_or_say_nothing_whatever_they_are(family: str, method: str, change: str) -> None:
    weights = weights_of(family, (40, 48))
    masks = ms.solve_matrix(weights, 3, 8, method=method)

    def certified(potentials: NDArray[np.floating[Any]] | None) -> TileCertificates:
        pattern = ms.Pattern(3, 8)
        ((_, found),) = certified_regions(weights, masks, pattern, "both", True, 0, potentials=potentials)
        return found

    expected = certified(None)
    _, good = ms.solve_matrix(weights, 3, 8, return_potentials=True)
    drawn = np.random.default_rng(0).standard_normal(good.shape)
    found = certified(CHANGES[change](good, drawn))
    assert np.array_equal(found.optimal, expected.optimal)
    assert np.allclose(found.kept, expected.kept, rtol=1e-12)
    assert np.allclose(found.upper_bound, expected.upper_bound, rtol=1e-12)
    assert np.allclose(found.importance, np.abs(weights.astype(float)).reshape(5, 8, 6, 8).sum(axis=(1, 3)))


@pytest.mark.parametrize("shape", [(13, 9), (8, 8), (4, 4), (3, 4, 4), (1, 4, 4), (3, 13, 9), (2, 3, 9, 6)])
@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("with_potentials", [True, False])
def test_a_region_says_of_each_tile_what_certify_says_of_it_alone(
    shape: tuple[int, ...], direction: Direction, saturated: bool, with_potentials: bool
) -> None:
    weights = weights_of("half zero", shape)
    masks = ms.solve_matrix(weights, 1, 4, method="greedy", direction=direction, saturated=saturated)
    potentials = None
    if with_potentials and direction == "both":
        _, potentials = ms.solve_matrix(weights, 1, 4, saturated=saturated, return_potentials=True)
    covered = np.zeros(shape, int)
    for region, found in certified_regions(
        weights, masks, ms.Pattern(1, 4), direction, saturated, 0, potentials=potentials
    ):
        height, width = region.tile_shape
        for index in np.ndindex(found.kept.shape):
            *lead, p, q = index
            top, left = region.rows.start + p * height, region.columns.start + q * width
            where = (*lead, slice(top, top + height), slice(left, left + width))
            covered[where] += 1
            importance = np.abs(weights[where].astype(float))
            exact = region.margins.exact_rows, region.margins.exact_columns
            assert found.importance[index] == pytest.approx(importance.sum())
            assert found.kept[index] == pytest.approx(importance[masks[where]].sum())
            assert found.optimal[index] == oracle.is_optimal_tile(weights[where], masks[where], 1, *exact)
            assert found.gap[index] == 0 or not found.optimal[index]
            bound = found.upper_bound[index]
            assert found.gap[index] == pytest.approx(0 if bound == 0 else 1 - found.kept[index] / bound)
    assert (covered == 1).all()


def test_a_mask_worse_by_less_than_float64_can_add_up_is_not_optimal() -> None:
    weights = np.array([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]])
    assert 1.0 + 1.0 == 1.0 + (1.0 + 2.0**-52)
    assert ms.certify(weights, np.eye(2), 1, 2).optimal
    assert not ms.certify(weights, 1 - np.eye(2), 1, 2).optimal


def test_a_mask_worse_by_the_smallest_weight_of_a_wide_tile_is_not_optimal() -> None:
    weights = np.array([[1e30, 1e30], [0, 1e-30]])
    assert ms.certify(weights, np.eye(2), 1, 2).optimal
    assert not ms.certify(weights, 1 - np.eye(2), 1, 2).optimal


def test_every_equally_good_mask_is_optimal() -> None:
    for mask in oracle.all_masks(4, 4, 1):
        assert ms.certify(np.full((4, 4), 0.1), mask, 1, 4).optimal
    # 0.1 + 0.3 and 0.2 + 0.2 are not the same in float64; here they must be: both diagonals hold the same numbers.
    swapped = np.array([[0.1, 0.3], [0.1, 0.3]])
    assert ms.certify(swapped, np.eye(2), 1, 2).optimal
    assert ms.certify(swapped, 1 - np.eye(2), 1, 2).optimal


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint8, bool, "bfloat16"])
def test_masks_of_zeros_and_ones_of_any_dtype_are_taken(dtype: Any) -> None:
    dtype = dtype_of(dtype)
    weights = np.diag([3.0, 2.0, 1.0])
    assert ms.certify(weights, np.eye(3).astype(dtype), 1, 3).optimal
    assert not ms.certify(weights, np.eye(3)[[1, 0, 2]].astype(dtype), 1, 3).optimal


@READINGS
def test_a_mask_that_keeps_too_much_is_refused(saturated: bool) -> None:
    with pytest.raises(ms.InvalidMaskError, match=r"mask\[0, 0:4\] keeps 4 of 4 entries"):
        ms.certify(np.ones((4, 4)), np.ones((4, 4)), 3, 4, saturated=saturated)
    with pytest.raises(ms.InvalidMaskError, match=r"mask\[0:4, 2\] keeps 4 of 4 entries"):
        ms.certify(np.ones((4, 4)), np.eye(4)[[2, 2, 2, 2]], 1, 4, saturated=saturated)


def test_a_short_mask_is_optimal_only_where_at_most_n_are_asked_for() -> None:
    weights = np.diag([1.0, 0.0])
    short = np.diag([1, 0])
    assert ms.certify(weights, short, 1, 2, saturated=False).optimal
    found = ms.certify(weights, short, 1, 2)
    assert not found.optimal
    assert found.gap == 0


@READINGS
def test_the_gap_of_a_mask_that_is_worse_by_less_than_sums_are_rounded_is_not_negative(saturated: bool) -> None:
    rng = np.random.default_rng(3)
    for weights in weights_of("near ties", (300, 5, 5)):
        found = ms.certify(weights, saturated_mask(rng, 2, 5), 2, 5, saturated=saturated)
        assert found.gap >= 0
        assert found.kept <= found.upper_bound


def test_a_short_mask_that_beats_every_saturated_one_has_a_negative_gap() -> None:
    weights = np.array([[0, 1, 1], [0, 1, 1], [0, 0, 0]])
    found = ms.certify(weights, weights, 2, 3)
    assert (found.kept, found.upper_bound, found.optimal) == (4, 3, False)
    assert found.gap < 0
    assert ms.certify(weights, weights, 2, 3, saturated=False).optimal


def test_a_tile_of_zeros_has_no_gap() -> None:
    assert ms.certify(np.zeros((4, 4)), np.eye(4), 1, 4) == ms.Certificate(0.0, 0.0, 0.0, True)
    assert ms.certify(np.zeros((4, 4)), np.zeros((4, 4)), 1, 4) == ms.Certificate(0.0, 0.0, 0.0, False)
    assert ms.certify(np.zeros((4, 4)), np.zeros((4, 4)), 1, 4, saturated=False).optimal


@READINGS
def test_weights_near_the_end_of_float64_are_judged(saturated: bool) -> None:
    weights = np.array([[1e308, 8e307, 1e300], [2e300, 5e307, 0], [0, 1e300, 1e290]])
    mask = ms.solve_block(weights, 1, 3, saturated=saturated)
    found = ms.certify(weights, mask, 1, 3, saturated=saturated)
    assert found.optimal
    assert found.kept == found.upper_bound == math.fsum(weights[mask])
    worse = ms.certify(weights, np.eye(3)[[1, 0, 2]], 1, 3, saturated=saturated)
    assert not worse.optimal
    assert 0 < worse.gap < 1


def test_bfloat16_weights_are_judged() -> None:
    weights = weights_of("gaussian bfloat16", (7, 10))
    assert ms.certify(weights, ms.solve_matrix(weights, 2, 5), 2, 5).optimal
    assert not ms.certify(weights, ms.solve_matrix(-1 / weights, 2, 5), 2, 5).optimal


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
def test_one_bad_tile_of_many_makes_a_matrix_not_optimal(direction: str) -> None:
    weights = weights_of("gaussian float32", (2, 13, 11))
    mask = ms.solve_matrix(weights, 2, 4, direction=direction)
    good = ms.certify(weights, mask, 2, 4, direction=direction)
    # Within the last tile, corner included, exchange an entry that is kept for nothing.
    last = np.argwhere(mask[1, 8:, 8:])[-1] + 8
    mask[(1, *last)] = False
    bad = ms.certify(weights, mask, 2, 4, direction=direction)
    assert (good.optimal, bad.optimal) == (True, False)
    assert good.kept - bad.kept == pytest.approx(abs(float(weights[(1, *last)])))


@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_one_sided_optima_beat_transposable_ones(direction: str) -> None:
    weights = weights_of("gaussian float32", (8, 8))
    both = ms.solve_matrix(weights, 3, 8)
    one_sided = ms.certify(weights, both, 3, 8, direction=direction)
    assert not one_sided.optimal
    assert one_sided.upper_bound > ms.certify(weights, both, 3, 8).upper_bound


def test_keeping_none_and_keeping_all_are_optimal() -> None:
    weights = weights_of("gaussian float64", (7, 9))
    assert ms.certify(weights, np.zeros((7, 9)), 0, 4) == ms.Certificate(0.0, 0.0, 0.0, True)
    found = ms.certify(weights, np.ones((7, 9)), 4, 4)
    assert found.optimal
    assert found.kept == pytest.approx(abs(weights).sum())


def test_the_certificate_of_a_large_batch_adds_up() -> None:
    weights = weights_of("int8", (500, 300))
    mask = ms.solve_matrix(weights, 2, 5, method=EXACT.name)
    found = ms.certify(weights, mask, 2, 5)
    assert found == ms.Certificate(kept := float(abs(weights.astype(int))[mask].sum()), kept, 0.0, True)


def test_certificates_are_the_same_every_time_on_several_threads() -> None:
    """NumPy before 2.2.2 fails here after the test of all layouts above: wrong numbers, or a crash, in numpy.abs."""
    weights = weights_of("int8", (500, 300))
    for layout in strategies.LAYOUTS.values():
        ms.certify(layout(weights), layout(ms.solve_matrix(weights, 2, 5)), 2, 5)
    expected = ms.certify(weights, ms.solve_matrix(weights, 2, 5), 2, 5)
    assert all(ms.certify(weights, ms.solve_matrix(weights, 2, 5), 2, 5) == expected for _ in range(50))


def test_a_certificate_holds_plain_python_numbers_and_cannot_be_changed() -> None:
    found = ms.certify(np.eye(2, dtype=np.float32), np.eye(2), 1, 2)
    assert [type(value) for value in vars(found).values()] == [float, float, float, bool]
    with pytest.raises(AttributeError):
        found.optimal = False  # type: ignore[misc]
