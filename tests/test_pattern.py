"""Pattern: n is what is kept."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import masksolve as ms
from masksolve._pattern import as_pattern

patterns = st.integers(1, 100).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m)))


@given(patterns)
def test_n_of_every_m_are_kept_and_the_rest_zeroed(pair: tuple[int, int]) -> None:
    pattern = ms.Pattern(*pair)
    assert (pattern.kept, pattern.zeros) == (pair[0], pair[1] - pair[0])
    assert pattern.kept + pattern.zeros == pattern.m


@given(patterns)
def test_a_printed_pattern_parses_to_itself(pair: tuple[int, int]) -> None:
    pattern = ms.Pattern(*pair)
    assert ms.Pattern.parse(str(pattern)) == pattern
    assert hash(ms.Pattern.parse(f" {pattern.n} : {pattern.m}\n")) == hash(pattern)


@given(patterns)
def test_counting_zeros_instead_is_the_mirror_image(pair: tuple[int, int]) -> None:
    pattern = ms.Pattern.from_zeros(*pair)
    assert (pattern.zeros, pattern.m) == pair
    assert ms.Pattern.from_zeros(pattern.zeros, pattern.m) == pattern


def test_one_of_four_is_kept_not_zeroed() -> None:
    assert ms.Pattern(1, 4).describe() == "1:4 (keeps 1 of every 4, zeroes 3)"
    assert str(ms.Pattern.from_zeros(1, 4)) == "3:4"
    assert ms.solve_block(np.ones((4, 4)), 1, 4).sum() == 4


def test_numpy_integers_are_integers() -> None:
    pattern = ms.Pattern(np.int8(3), np.uint64(4))  # type: ignore[arg-type]
    assert pattern == ms.Pattern(3, 4)
    assert type(pattern.n) is type(pattern.m) is int


@given(patterns)
def test_text_a_tuple_and_a_pattern_mean_the_same(pair: tuple[int, int]) -> None:
    pattern = ms.Pattern(*pair)
    assert as_pattern(pattern) is pattern
    assert as_pattern(str(pattern)) == as_pattern(pair) == pattern


@pytest.mark.parametrize("given", [4, [2, 4], (2, 4, 1), None, b"2:4"], ids=repr)
def test_nothing_else_stands_for_a_pattern(given: Any) -> None:
    with pytest.raises(TypeError, match=rf'a pattern is "N:M", \(N, M\) or a Pattern, .* got {re.escape(repr(given))}'):
        as_pattern(given)


NOT_INTEGERS = [True, False, np.True_, 2.0, np.float32(2), "2", None, 2 + 0j]


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
def test_n_and_m_are_integers_and_nothing_like_them(value: Any) -> None:
    with pytest.raises(TypeError, match="n must be an integer, got"):
        ms.Pattern(value, 4)
    with pytest.raises(TypeError, match="m must be an integer, got"):
        ms.Pattern(1, value)
    with pytest.raises(TypeError, match="zeros must be an integer, got"):
        ms.Pattern.from_zeros(value, 4)


WITH_PATTERN: dict[str, Callable[[Any, int, int], Any]] = {
    "Pattern": lambda block, n, m: ms.Pattern(n, m),
    "solve_block": ms.solve_block,
    "solve_blocks": lambda block, n, m: ms.solve_blocks(block[None], n, m),
    "solve_matrix": ms.solve_matrix,
    "check_mask": ms.check_mask,
    "is_valid_mask": ms.is_valid_mask,
    "certify": lambda block, n, m: ms.certify(block, block, n, m),
}


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [(5, 4, "got n=5"), (-1, 4, "got n=-1"), (0, 0, "got m=0"), (1, -4, "got m=-4"), (10**30, 4, "got n=10{30}")],
)
@pytest.mark.parametrize("function", WITH_PATTERN)
def test_n_and_m_out_of_range_are_refused_everywhere(n: int, m: int, message: str, function: str) -> None:
    side = min(max(m, 1), 4)
    with pytest.raises(ValueError, match=message) as caught:
        WITH_PATTERN[function](np.ones((side, side)), n, m)
    assert not isinstance(caught.value, ms.InvalidMaskError)


@pytest.mark.parametrize(("zeros", "m"), [(5, 4), (-1, 4), (0, 0), (1, -1)])
def test_zeros_out_of_range_are_refused(zeros: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"=(?:{zeros}|{m})"):
        ms.Pattern.from_zeros(zeros, m)


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2/4", "2:4:8", "-1:4", "2.0:4", "two:four", "2 4", "+2:4", "２:４", "2_0:40"]
)
def test_text_that_is_no_pattern_is_refused_and_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="whole numbers") as caught:
        ms.Pattern.parse(text)
    assert repr(text) in str(caught.value)


def test_only_text_is_parsed() -> None:
    with pytest.raises(TypeError, match=r"\(2, 4\)"):
        ms.Pattern.parse((2, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=8"):
        ms.Pattern.parse("8:4")


def test_a_pattern_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        ms.Pattern(2, 4).n = 3  # type: ignore[misc]
