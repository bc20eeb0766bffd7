"""check_mask and is_valid_mask."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import masksolve as ms
from tests import oracle, strategies
from tests.extras import dtype_of
from tests.strategies import saturated_mask
from tests.tables import PATTERNS, Pair, name_of

any_mask = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=4, max_side=7))


@given(any_mask, strategies.patterns, strategies.readings, strategies.directions)
def test_masks_are_judged_as_the_oracle_does(mask: np.ndarray, pattern: Pair, saturated: bool, direction: str) -> None:
    valid = oracle.is_valid(mask, *pattern, saturated, direction)
    assert ms.is_valid_mask(mask, *pattern, saturated=saturated, direction=direction) == valid
    if valid:
        assert ms.check_mask(mask, *pattern, saturated=saturated, direction=direction) is None
    else:
        with pytest.raises(ms.InvalidMaskError):
            ms.check_mask(mask, *pattern, saturated=saturated, direction=direction)


@given(strategies.patterns, strategies.readings, strategies.directions, strategies.layouts, st.data())
def test_one_entry_more_or_less_is_noticed_in_any_layout(
    pattern: Pair, saturated: bool, direction: str, layout: str, data: st.DataObject
) -> None:
    n, m = pattern
    mask = np.tile(saturated_mask(np.random.default_rng(0), n, m), (2, 2))
    lay_out = strategies.LAYOUTS[layout]
    assert ms.is_valid_mask(lay_out(mask), n, m, saturated=True, direction=direction)
    entry = data.draw(st.tuples(st.integers(0, 2 * m - 1), st.integers(0, 2 * m - 1)))
    mask[entry] = not mask[entry]
    # One less is still at most n.
    assert ms.is_valid_mask(lay_out(mask), n, m, saturated=saturated, direction=direction) == (
        not saturated and not mask[entry]
    )


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if pattern[0] < pattern[1]], ids=name_of)
@pytest.mark.parametrize(("along", "kept_along"), [("columns", "rows"), ("rows", "columns")])
def test_masks_that_break_only_rows_or_only_columns_are_refused(pattern: Pair, along: str, kept_along: str) -> None:
    n, m = pattern
    mask = np.zeros((m, m), bool)
    mask[:, :n] = True
    if along == "rows":
        mask = mask.T
    assert ms.is_valid_mask(mask, n, m, saturated=True, direction=kept_along)
    assert not ms.is_valid_mask(mask, n, m)
    with pytest.raises(ms.InvalidMaskError, match=f"along {along} allows at most {n}"):
        ms.check_mask(mask, n, m)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ((0, 0), r"mask\[0, 0:4\] keeps 2 of 4 entries; 1:4 along rows allows at most 1"),
        ((6, 5), r"mask\[6, 4:8\] keeps 2 of 4 entries"),
        ((2, 9), r"mask\[2, 8:10\] keeps 2 of 2 entries; 1:4 along rows allows at most 1"),
    ],
)
def test_the_first_bad_group_of_a_row_is_named(where: tuple[int, int], message: str) -> None:
    mask = np.zeros((8, 10), bool)
    row, column = where
    mask[row, [column, column + 1 if column % 4 == 0 else column - 1]] = True
    with pytest.raises(ms.InvalidMaskError, match=message):
        ms.check_mask(mask, 1, 4)
    with pytest.raises(ms.InvalidMaskError, match=message.replace(r"mask\[", r"mask\[0, 1, ")):
        ms.check_mask(np.stack([np.zeros_like(mask), mask])[None], 1, 4)


def test_the_first_of_many_bad_groups_is_named() -> None:
    with pytest.raises(ms.InvalidMaskError, match=r"mask\[0, 0:2\]"):
        ms.check_mask(np.ones((5, 5)), 1, 2)
    with pytest.raises(ms.InvalidMaskError, match=r"mask\[0:2, 3\] keeps 2 of 2 entries; 1:2 along columns"):
        ms.check_mask([[0, 0, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1]], 1, 2)
    with pytest.raises(ms.InvalidMaskError, match=r"mask\[4:6, 1\] keeps 2 of 2 entries; 1:4 along columns"):
        ms.check_mask(np.array([[0, 0], [0, 0], [0, 0], [0, 0], [0, 1], [0, 1]]), 1, 4)


def test_short_groups_are_named_where_exactly_n_are_asked_for() -> None:
    mask = saturated_mask(np.random.default_rng(0), 3, 5)
    mask[2] = False
    ms.check_mask(mask, 3, 5)
    with pytest.raises(ms.InvalidMaskError, match=r"mask\[2, 0:5\] keeps 0 of 5 entries; 3:5 .* asks for exactly 3"):
        ms.check_mask(mask, 3, 5, saturated=True)


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_a_partial_group_holds_at_most_n_even_where_saturated(shape: Pair, kept: int) -> None:
    mask = (np.arange(3) < kept).reshape(shape)
    assert ms.is_valid_mask(mask, 2, 4, saturated=True) == (kept <= 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8, bool, "bfloat16"])
def test_zeros_and_ones_of_any_dtype_are_a_mask(dtype: Any) -> None:
    dtype = dtype_of(dtype)
    assert ms.is_valid_mask(np.eye(4).astype(dtype), 1, 4, saturated=True)
    assert not ms.is_valid_mask(np.ones((4, 4)).astype(dtype), 1, 4)


CHECKS = pytest.mark.parametrize("function", [ms.check_mask, ms.is_valid_mask])


@CHECKS
@pytest.mark.parametrize(("value", "shown"), [(0.5, "0.5"), (2, "2"), (-1, "-1"), (np.nan, "nan")])
def test_anything_but_zero_and_one_is_not_a_mask(value: float, shown: str, function: Callable[..., Any]) -> None:
    mask = np.zeros((2, 3, 3))
    mask[1, 0, 2] = value
    with pytest.raises(ValueError, match=rf"mask\[1, 0, 2\] is {shown}.*only 0 and 1"):
        function(mask, 1, 3)


@CHECKS
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([1, 0], ValueError, r"\(2,\)"),
        (np.zeros((0, 4)), ValueError, r"\(0, 4\)"),
        ([["a"]], TypeError, "<U1"),
        ([[1j]], TypeError, "complex128"),
        (np.array([[None]]), TypeError, "object"),
    ],
)
def test_what_is_not_a_mask_is_refused_in_one_line(
    mask: Any, error: type[Exception], message: str, function: Callable[..., Any]
) -> None:
    with pytest.raises(error, match=message) as caught:
        function(mask, 1, 2)
    assert not isinstance(caught.value, ms.InvalidMaskError)
    assert "\n" not in str(caught.value)


def test_an_invalid_mask_is_a_value_error() -> None:
    assert issubclass(ms.InvalidMaskError, ValueError)
