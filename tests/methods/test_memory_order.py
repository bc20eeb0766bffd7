"""Weights in any memory order, and 16-bit floats: the same masks, which lie as the weights do."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

import masksolve as ms
from masksolve._methods import exact
from masksolve._methods.exact import halves
from masksolve._tiles import Direction
from tests.extras import dtype_of
from tests.tables import PATTERNS, Pair, name_of, weights_of

ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "Fortran, in a larger one": lambda array: (
        np.pad(array, [(0, 0)] * (array.ndim - 2) + [(2, 3)] * 2, "edge").T.copy().T[..., 2:-3, 2:-3]
    ),
    "stack last": lambda array: np.moveaxis(np.moveaxis(array, 0, -1).copy(), -1, 0),
}
SOLVED = [(n, m) for n, m in PATTERNS if n < m]


@pytest.fixture(autouse=True)
def weights_are_not_too_few_to_be_solved_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_FEW_WEIGHTS", 0)


@pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
@pytest.mark.parametrize("pattern", SOLVED, ids=name_of)
@pytest.mark.parametrize("order", ORDERS)
def test_masks_of_weights_with_one_optimum_do_not_depend_on_the_memory_order(
    order: str, pattern: Pair, saturated: bool
) -> None:
    n, m = pattern
    # Partial tiles of all shapes, at the edges.
    weights = weights_of("gaussian float32", (2, 3 * m - 1, 2 * m + m // 2))
    expected = ms.solve_matrix(weights, n, m, saturated=saturated)
    assert np.array_equal(ms.solve_matrix(ORDERS[order](weights), n, m, saturated=saturated), expected)


@pytest.mark.parametrize("direction", ["both", "rows", "columns"])
@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("order", ORDERS)
def test_masks_lie_in_memory_as_the_weights_do(order: str, method: str, direction: Direction) -> None:
    weights = ORDERS[order](weights_of("int8", (3, 16, 24)))
    for n in (0, 3, 8):
        mask = ms.solve_matrix(weights, n, 8, method=method, direction=direction)
        assert mask.strides == np.empty_like(weights, np.bool_).strides
    assert ms.solve_block(weights[0, :8, :8], 3, 8).flags.forc


@pytest.mark.parametrize("order", ORDERS)
def test_potentials_are_those_of_columns_in_every_memory_order(order: str) -> None:
    weights = weights_of("gaussian float32", (2, 25, 34))
    expected = ms.solve_matrix(weights, 3, 8, return_potentials=True)
    found = ms.solve_matrix(ORDERS[order](weights), 3, 8, return_potentials=True)
    warm = ms.solve_matrix(ORDERS[order](weights), 3, 8, potentials=expected[1], return_potentials=True)
    assert np.array_equal(expected[0], found[0])
    assert np.array_equal(expected[1], found[1])
    assert np.array_equal(expected[0], warm[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_float_is_widened_to_what_it_is(dtype: str) -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype_of(dtype)).reshape(1, 2, 2, -1)
    with np.errstate(invalid="ignore"):
        expected = numbers.astype(np.float32)
    widened = np.empty(numbers.shape, np.float32)
    halves.widen(numbers, widened)
    is_number = ~np.isnan(expected)
    assert np.array_equal(np.isnan(widened), ~is_number)
    assert np.array_equal(widened.view(np.uint32)[is_number], expected.view(np.uint32)[is_number])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 100])
def test_16_bit_floats_are_widened_wherever_they_lie(count: int, dtype: str) -> None:
    numbers: NDArray[np.generic] = (
        np.random.default_rng(0).standard_normal((4, 6, 8, count + 3)).astype(dtype_of(dtype))
    )
    for part in (numbers, numbers[1:, ::-1, ::3, 2:-1], numbers[:, :1].swapaxes(0, 2)):
        assert halves.can_widen(part)
        target = np.full((*part.shape[:3], part.shape[3] + 2), -7, np.float32)
        halves.widen(part, target[..., :-2])
        assert np.array_equal(target[..., :-2], part.astype(np.float32))
        assert (target[..., -2:] == -7).all()
    assert not halves.can_widen(numbers[..., ::2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("pattern", SOLVED, ids=name_of)
@pytest.mark.parametrize("order", ORDERS)
def test_16_bit_floats_get_the_masks_of_the_same_float32(order: str, pattern: Pair, dtype: str) -> None:
    n, m = pattern
    weights = weights_of("gaussian float32", (2, 3 * m - 1, 2 * m + m // 2)).astype(dtype_of(dtype))
    narrow, wide = ORDERS[order](weights), ORDERS[order](weights.astype(np.float32))
    for direction in ("both", "rows", "columns"):
        masks = [ms.solve_matrix(each, n, m, direction=direction) for each in (narrow, wide)]
        assert np.array_equal(*masks)
