"""Bad input gets one line that repeats what was given."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import masksolve as ms
from tests import strategies
from tests.extras import dtype_of, need
from tests.tables import APPROXIMATE_METHODS, EXACT_METHODS

BLOCK = np.ones((4, 4))
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "solve_block": lambda weights: ms.solve_block(weights, 1, 4),
    "solve_blocks": lambda weights: ms.solve_blocks(weights, 1, 4),
    "solve_matrix": lambda weights: ms.solve_matrix(weights, 1, 4),
    "certify": lambda weights: ms.certify(weights, np.zeros(np.shape(weights)), 1, 4),
}
EVERY_FUNCTION = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
METHODS = sorted({method.name for method in EXACT_METHODS + APPROXIMATE_METHODS})


def refuses(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


@given(
    st.sampled_from(strategies.FLOATS),
    st.sampled_from([(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")]),
    st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 8)),
    strategies.directions,
    strategies.layouts,
)
def test_nan_and_infinities_are_refused_by_name_and_position(
    dtype: np.dtype[Any], bad: tuple[float, str], index: tuple[int, int, int], direction: str, layout: str
) -> None:
    weights = np.ones((2, 7, 9), dtype)
    weights[index] = bad[0]
    weights = strategies.LAYOUTS[layout](weights)
    message = rf"^weights\[{index[0]}, {index[1]}, {index[2]}\] is {bad[1]};"
    refuses(ValueError, message, lambda: ms.solve_matrix(weights, 1, 4, direction=direction))
    refuses(ValueError, message, lambda: ms.certify(weights, np.zeros((2, 7, 9)), 1, 4, direction=direction))


def test_a_nan_at_the_end_of_a_large_matrix_is_found() -> None:
    weights = np.ones((700, 500), np.float32)
    weights[650, 499] = weights[699, 0] = np.nan
    refuses(ValueError, r"^weights\[650, 499\] is nan", lambda: ms.solve_matrix(weights, 1, 4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [0, 1, 4])
def test_no_method_and_no_trivial_pattern_lets_nan_through(method: str, n: int) -> None:
    weights = BLOCK.copy()
    weights[3, 2] = np.nan
    refuses(ValueError, r"weights\[3, 2\] is nan", lambda: ms.solve_block(weights, n, 4, method=method))


@EVERY_FUNCTION
@pytest.mark.parametrize(
    ("dtype", "shown"),
    [
        (complex, "complex128"),
        (object, "object"),
        (str, "<U"),
        (bytes, r"\|S"),
        (bool, "bool"),
        ("M8[s]", "datetime64"),
        ("m8[s]", "timedelta64"),
        ([("x", float)], "'x'"),
        pytest.param(
            np.longdouble,
            "float128",
            marks=pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is float64 here"),
        ),
        ("float8_e4m3fn", r"float8_e4m3fn.*astype\(numpy.float32\)"),
        ("float8_e5m2", r"float8_e5m2.*astype\(numpy.float32\)"),
        ("int4", "int4"),
    ],
)
def test_dtypes_that_are_not_real_are_refused_by_name(function: Callable[[Any], Any], dtype: Any, shown: str) -> None:
    shape = (1, 4, 4) if function is FUNCTIONS["solve_blocks"] else (4, 4)
    refuses(TypeError, f"dtype .*{shown}", lambda: function(np.zeros(shape, dtype_of(dtype))))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ms.solve_block(np.ones(4), 1, 4), r"shape \(4,\)"),
        (lambda: ms.solve_block(np.ones((1, 4, 4)), 1, 4), r"shape \(1, 4, 4\); expected 2 dimensions, \(m, m\)"),
        (lambda: ms.solve_block(np.ones((4, 5)), 1, 4), r"shape \(4, 5\); 1:4 needs blocks of 4x4"),
        (lambda: ms.solve_block(np.ones((5, 5)), 1, 4), r"shape \(5, 5\); 1:4 needs blocks of 4x4"),
        (lambda: ms.solve_blocks(BLOCK, 1, 4), r"shape \(4, 4\); expected 3 dimensions, \(B, m, m\)"),
        (lambda: ms.solve_blocks(np.ones((2, 4, 5)), 1, 4), r"shape \(2, 4, 5\)"),
        (lambda: ms.solve_blocks(np.ones((2, 8, 8)), 1, 4), r"shape \(2, 8, 8\)"),
        (lambda: ms.solve_matrix(np.ones(4), 1, 4), r"shape \(4,\)"),
        (lambda: ms.solve_matrix(3.0, 1, 4), r"shape \(\)"),
        (lambda: ms.certify(np.ones(4), np.ones(4), 1, 4), r"shape \(4,\)"),
        (lambda: ms.certify(BLOCK, np.eye(5), 1, 4), r"mask has shape \(5, 5\), the weights \(4, 4\)"),
        (lambda: ms.certify(BLOCK, np.zeros((1, 4, 4)), 1, 4), r"mask has shape \(1, 4, 4\), the weights \(4, 4\)"),
    ],
)
def test_wrong_shapes_are_refused_and_repeated(call: Callable[[], Any], message: str) -> None:
    refuses(ValueError, message, call)


@EVERY_FUNCTION
def test_empty_arrays_are_refused(function: Callable[[Any], Any]) -> None:
    shapes = [(0, 4, 4)] if function is FUNCTIONS["solve_blocks"] else [(0, 4), (4, 0), (0, 0)]
    for shape in shapes:
        refuses(ValueError, r"shape \(.*\), which is empty", lambda shape=shape: function(np.ones(shape)))
    refuses(ValueError, r"\(2, 0, 3\), which is empty", lambda: ms.solve_matrix(np.ones((2, 0, 3)), 1, 4))


def test_ragged_lists_are_refused() -> None:
    ragged: Any = [[1, 2], [3]]
    message = "a list that is not a rectangle of numbers.*rows of one length"
    refuses(ValueError, f"weights are {message}", lambda: ms.solve_matrix(ragged, 1, 2))
    refuses(ValueError, f"the mask is {message}", lambda: ms.check_mask(ragged, 1, 2))
    refuses(ValueError, f"potentials are {message}", lambda: ms.solve_matrix(BLOCK, 1, 4, potentials=ragged))


WITH_FLAG: dict[str, Callable[[Any], Any]] = {
    "solve_block": lambda value: ms.solve_block(BLOCK, 1, 4, saturated=value),
    "solve_matrix": lambda value: ms.solve_matrix(BLOCK, 1, 4, saturated=value),
    "certify": lambda value: ms.certify(BLOCK, np.eye(4), 1, 4, saturated=value),
    "check_mask": lambda value: ms.check_mask(np.eye(4), 1, 4, saturated=value),
    "is_valid_mask": lambda value: ms.is_valid_mask(np.eye(4), 1, 4, saturated=value),
    "count": lambda value: ms.diversity.count(1, 4, saturated=value),
    "return_potentials": lambda value: ms.solve_matrix(BLOCK, 1, 4, return_potentials=value),
    "complete": lambda value: ms.solve_block(BLOCK, 1, 4, method="greedy", complete=value),
}


@pytest.mark.parametrize("value", [None, "no", 1, 0, np.array([True])], ids=repr)
@pytest.mark.parametrize("call", WITH_FLAG)
def test_flags_are_true_or_false(call: str, value: Any) -> None:
    refuses(TypeError, "must be True or False, got", lambda: WITH_FLAG[call](value))


@pytest.mark.parametrize("call", WITH_FLAG)
def test_flags_of_numpy_are_flags(call: str) -> None:
    WITH_FLAG[call](np.True_)


def test_masked_arrays_are_refused_since_what_they_hide_is_not_to_count() -> None:
    hiding = np.ma.masked_greater(np.arange(16.0).reshape(4, 4), 12)
    refuses(TypeError, r"weights are a masked array.*filled\(0\)", lambda: ms.solve_matrix(hiding, 1, 4))
    refuses(TypeError, r"weights are a masked array", lambda: ms.certify(hiding, np.eye(4), 1, 4))
    refuses(TypeError, r"the mask is a masked array.*filled\(0\)", lambda: ms.check_mask(hiding, 1, 4))
    start = np.ma.masked_greater(np.ones((1, 1, 4)), 0)
    refuses(TypeError, r"potentials are a masked array", lambda: ms.solve_matrix(BLOCK, 1, 4, potentials=start))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_that_float64_cannot_hold_are_refused_by_position(dtype: Any) -> None:
    weights = np.zeros((4, 4), dtype)
    weights[2, 1] = 2**53
    assert ms.solve_block(weights, 1, 4)[2, 1]
    weights[2, 1] += 1
    refuses(ValueError, r"weights\[2, 1\] is 9007199254740993;", lambda: ms.solve_block(weights, 1, 4))
    weights[2, 1] = np.iinfo(dtype).max
    refuses(ValueError, r"weights\[2, 1\] is \d+;", lambda: ms.certify(weights, np.eye(4), 1, 4))


def test_the_lowest_integer_is_refused() -> None:
    weights = np.zeros((4, 4), np.int64)
    weights[0, 3] = np.iinfo(np.int64).min
    refuses(ValueError, r"weights\[0, 3\] is -9223372036854775808", lambda: ms.solve_block(weights, 1, 4))


WITH_N: dict[str, Callable[[Any], Any]] = {
    "solve_block": lambda value: ms.solve_block(BLOCK, value, 4),
    "solve_blocks": lambda value: ms.solve_blocks(BLOCK[None], value, 4),
    "solve_matrix": lambda value: ms.solve_matrix(BLOCK, value, 4),
    "certify": lambda value: ms.certify(BLOCK, BLOCK, value, 4),
    "check_mask": lambda value: ms.check_mask(BLOCK, value, 4),
    "is_valid_mask": lambda value: ms.is_valid_mask(BLOCK, value, 4),
}


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 5], ids=repr)
@pytest.mark.parametrize("call", WITH_N)
def test_n_is_checked_by_every_function(call: str, value: Any) -> None:
    error = ValueError if type(value) is int else TypeError
    refuses(error, f"got (n=)?{value!r}", lambda: WITH_N[call](value))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("exakt", "exact"), ("Greedy", "greedy"), ("two_approx", "two-approx"), ("enum", "enumerate"), ("flows", "flow")],
)
def test_an_unknown_method_is_answered_with_the_nearest_name(name: str, meant: str) -> None:
    message = rf"unknown method '{name}'; allowed are 'exact', .*'two-approx'; did you mean '{meant}'\?"
    refuses(ValueError, message, lambda: ms.solve_block(BLOCK, 1, 4, method=name))
    refuses(ValueError, message, lambda: ms.solve_blocks(BLOCK[None], 1, 4, method=name))
    refuses(ValueError, message, lambda: ms.solve_matrix(BLOCK, 4, 4, method=name))


@pytest.mark.parametrize(
    "options", [{"return_potentials": True}, {"potentials": np.zeros((1, 1, 4))}], ids=["out", "in"]
)
def test_potentials_are_refused_for_what_has_none_and_unknown_names_for_being_unknown(options: dict[str, Any]) -> None:
    def call(**more: Any) -> Callable[[], Any]:
        return lambda: ms.solve_matrix(BLOCK, 1, 4, **options, **more)

    refuses(ValueError, "method 'greedy' with direction 'both' has no potentials", call(method="greedy"))
    refuses(ValueError, "method 'exact' with direction 'rows' has no potentials", call(direction="rows"))
    refuses(ValueError, r"unknown method 'exat'.*did you mean 'exact'\?", call(method="exat"))
    refuses(ValueError, r"unknown direction 'row'.*did you mean 'rows'\?", call(direction="row"))


@pytest.mark.parametrize("given", [np.zeros(4), np.zeros((1, 1, 4), int), np.full((1, 1, 4), np.nan)], ids=str)
def test_potentials_of_another_shape_or_dtype_or_that_are_not_finite_are_refused(given: Any) -> None:
    refuses(ValueError, "^potentials h", lambda: ms.solve_matrix(BLOCK, 1, 4, potentials=given))


@pytest.mark.parametrize("name", ["", "zzz", None, 3, ["exact"]], ids=repr)
def test_an_unknown_method_that_is_near_to_none_is_repeated(name: Any) -> None:
    with pytest.raises(ValueError, match="unknown method") as caught:
        ms.solve_block(BLOCK, 1, 4, method=name)
    assert repr(name) in str(caught.value)
    assert "did you mean" not in str(caught.value) or name == ["exact"]


@pytest.mark.parametrize("name", ["row", "Rows", "column", "bot", None, 0], ids=repr)
def test_an_unknown_direction_is_repeated_with_what_is_allowed(name: Any) -> None:
    message = f"unknown direction {name!r}; allowed are 'both', 'rows', 'columns'"
    refuses(ValueError, message, lambda: ms.solve_matrix(BLOCK, 1, 4, direction=name))
    refuses(ValueError, message, lambda: ms.check_mask(BLOCK, 1, 4, direction=name))
    refuses(ValueError, message, lambda: ms.is_valid_mask(BLOCK, 1, 4, direction=name))
    refuses(ValueError, message, lambda: ms.certify(BLOCK, np.eye(4), 1, 4, direction=name))


def test_the_nearest_direction_is_named() -> None:
    refuses(ValueError, r"did you mean 'rows'\?", lambda: ms.solve_matrix(BLOCK, 1, 4, direction="row"))


@pytest.mark.parametrize(
    ("method", "option", "message"),
    [
        ("exact", "complete", "method 'exact' has no option 'complete'; it takes none"),
        ("greedy", "completed", r"method 'greedy' has no option 'completed'.*did you mean 'complete'\?"),
        ("lp", "backends", r"method 'lp' has no option 'backends'.*did you mean 'backend'\?"),
        ("two-approx", "backend", "method 'two-approx' has no option 'backend'"),
    ],
)
def test_an_option_that_the_method_lacks_is_refused(method: str, option: str, message: str) -> None:
    refuses(TypeError, message, lambda: ms.solve_block(BLOCK, 1, 4, method=method, **{option: True}))


def test_an_unknown_backend_is_answered_with_the_nearest_name() -> None:
    need("lp")
    message = r"unknown backend 'high'; allowed are 'highs', 'pulp'; did you mean 'highs'\?"
    refuses(ValueError, message, lambda: ms.solve_block(BLOCK, 1, 4, method="lp", backend="high"))


@pytest.mark.parametrize(
    ("threads", "error"), [(0, ValueError), (-2, ValueError), (True, TypeError), (1.0, TypeError), ("2", TypeError)]
)
def test_threads_are_a_positive_integer(threads: Any, error: type[Exception]) -> None:
    refuses(error, f"threads must .*got {threads!r}", lambda: ms.solve_matrix(BLOCK, 1, 4, threads=threads))
    refuses(error, f"threads must .*got {threads!r}", lambda: ms.solve_blocks(BLOCK[None], 1, 4, threads=threads))


def test_numpy_integers_are_taken_for_threads_and_patterns() -> None:
    mask = ms.solve_matrix(BLOCK, np.int16(1), np.uint8(4), threads=np.int64(2))  # type: ignore[arg-type]
    assert mask.sum() == 4


@pytest.mark.parametrize(
    "function",
    [
        *(ms.solve_block, ms.solve_blocks, ms.solve_matrix, ms.check_mask, ms.is_valid_mask, ms.certify),
        *(ms.diversity.count, ms.diversity.log2_count, ms.diversity.bits_per_weight, ms.diversity.mask_diversity),
        *(ms.odds.tile_odds, ms.odds.share_of_groups, ms.odds.share_of_rows, ms.odds.choose_pattern, ms.random_mask),
    ],
    ids=lambda function: function.__name__,
)
def test_everything_after_the_pattern_is_keyword_only(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    before = {"weights", "blocks", "mask", "n", "m", "pattern", "size", "sparsity"}
    positional = {name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD}
    assert positional <= before
    # What comes before the pattern, or with it, cannot be left out: but for how many random masks.
    assert all(parameters[name].default is inspect.Parameter.empty for name in positional - {"size"})
