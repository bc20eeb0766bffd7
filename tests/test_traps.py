"""Where the libraries behind the methods are known to go wrong."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import masksolve as ms
from tests import oracle, processes
from tests.extras import dtype_of, need
from tests.strategies import saturated_mask
from tests.tables import EXACT_METHODS, SMALL_PATTERNS, Method, Pair, name_of, spread, weights_of

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
LP_METHODS = [method for method in EXACT_METHODS if method.name == "lp"]
SOLVERS = [method for method in EXACT_METHODS if method.name in ("flow", "lp")]


def solve(method: Method, weights: Any, n: int, m: int, **options: Any) -> np.ndarray:
    return ms.solve_block(weights, n, m, method=method.name, **options, **method.options)


def shortfall(method: Method, weights: np.ndarray, n: int, m: int, saturated: bool) -> Fraction:
    """How much less than the optimum a method keeps, as a share of the largest weight."""
    best = ms.solve_block(weights, n, m, saturated=saturated)
    assert oracle.is_optimal_tile(weights, best, n, saturated, saturated)
    mask = solve(method, weights, n, m, saturated=saturated)
    assert oracle.is_valid_tile(mask, n, saturated, saturated)
    return (oracle.kept(weights, best) - oracle.kept(weights, mask)) / Fraction(float(abs(weights).max()))


@READINGS
def test_flow_is_optimal_where_costs_times_a_thousand_and_rounded_are_not(saturated: bool) -> None:
    need("flow")
    weights = weights_of("gaussian float32", (8, 8)) * np.float32(0.001)
    rounded = np.rint(weights * 1000)
    naive = ms.solve_block(rounded, 3, 8, saturated=saturated)
    assert not oracle.is_optimal_tile(weights, naive, 3, saturated, saturated)
    mask = ms.solve_block(weights, 3, 8, method="flow", saturated=saturated)
    assert oracle.is_optimal_tile(weights, mask, 3, saturated, saturated)


@READINGS
@pytest.mark.parametrize("family", ["gaussian float16", "gaussian bfloat16", "int8", "int64", "subnormal float32"])
@pytest.mark.parametrize("pattern", [(2, 5), (5, 8), (3, 16), (7, 32)], ids=name_of)
def test_flow_loses_no_bit_of_weights_that_fit_its_integers(family: str, pattern: Pair, saturated: bool) -> None:
    need("flow")
    n, m = pattern
    weights = weights_of(family, (m, m))
    mask = ms.solve_block(weights, n, m, method="flow", saturated=saturated)
    assert oracle.is_optimal_tile(weights, mask, n, saturated, saturated)


@READINGS
@pytest.mark.parametrize("family", ["mixed magnitudes", "all magnitudes", "largest", "huge"])
@pytest.mark.parametrize("pattern", [(1, 2), (3, 8), (16, 32)], ids=name_of)
def test_flow_takes_any_magnitudes_in_one_tile(family: str, pattern: Pair, saturated: bool) -> None:
    need("flow")
    n, m = pattern
    weights = weights_of(family, (m, m))
    assert shortfall(EXACT_METHODS[1], weights, n, m, saturated) <= Fraction(1e-12)


@pytest.mark.parametrize("largest", [np.finfo(np.float64).max, 5e-324])
def test_flow_takes_a_large_tile_of_equal_largest_weights(largest: float) -> None:
    need("flow")
    assert oracle.is_valid_tile(ms.solve_block(np.full((64, 64), largest), 40, 64, method="flow"), 40)


@READINGS
@pytest.mark.parametrize("scale", [1e-8, 1e-30, 1e-300, 5e-324, 1e30, 1e306])
@pytest.mark.parametrize("method", SOLVERS, ids=str)
def test_absolute_tolerances_do_not_matter_to_small_and_large_weights(
    method: Method, scale: float, saturated: bool
) -> None:
    weights = weights_of("int8", (5, 5)) / 2 * scale
    assert shortfall(method, weights, 2, 5, saturated) <= Fraction(method.resolution)


@READINGS
@pytest.mark.parametrize(("method", "bump"), [(SOLVERS[0], 2.0**-52), (SOLVERS[1], 1e-12), (SOLVERS[2], 1e-8)], ids=str)
@pytest.mark.parametrize("pattern", SMALL_PATTERNS[1:], ids=name_of)
def test_near_ties_are_told_apart(method: Method, bump: float, pattern: Pair, saturated: bool) -> None:
    n, m = pattern
    best = saturated_mask(np.random.default_rng(0), n, m)
    assert (solve(method, 1 + bump * best, n, m, saturated=saturated) == best).all()


@READINGS
@pytest.mark.parametrize(
    ("method", "pattern", "value"), spread(LP_METHODS, [*SMALL_PATTERNS, (7, 13)], [0.0, 1.0, -0.1, 1e-30], one_in=3)
)
def test_lp_returns_no_halves_on_constant_tiles(method: Method, pattern: Pair, value: float, saturated: bool) -> None:
    n, m = pattern
    weights = np.full((m, m), value)
    mask = solve(method, weights, n, m, saturated=saturated)
    assert oracle.is_optimal_tile(weights, mask, n, saturated, saturated)


SOLVE_WITH = """
import sys, warnings
import masksolve
warnings.simplefilter("ignore", DeprecationWarning)
for name in sys.argv[1].split():
    options = {"method": "lp", "backend": "pulp"} if name == "pulp" else {"method": name}
    mask = masksolve.solve_block([[3, 1, 2], [1, 1, 1], [4, 1, 5]], 1, 3, **options)
    print(name, mask.astype(int).tolist())
"""


@pytest.mark.parametrize("order", ["flow lp pulp flow", "pulp lp flow lp", "lp flow pulp exact"])
def test_all_libraries_run_in_one_process_in_any_order(order: str) -> None:
    need("flow")
    need("lp")
    expected = "".join(f"{name} [[1, 0, 0], [0, 1, 0], [0, 0, 1]]\n" for name in order.split())
    assert processes.run(SOLVE_WITH, order) == expected


def test_no_method_but_pulp_imports_highspy_even_where_it_is_installed(tmp_path: Path) -> None:
    need("flow")
    need("lp")
    # highspy and ortools crash in one process (or-tools issue 5246); SciPy brings a HiGHS of its own.
    (tmp_path / "highspy.py").write_text("raise SystemExit('highspy was imported')")
    script = f"import sys\nsys.path.insert(0, sys.argv[2])\n{SOLVE_WITH}\nprint('highspy' in sys.modules)"
    assert processes.run(script, "flow lp exact greedy", tmp_path).endswith("False\n")


@pytest.mark.parametrize(
    ("n", "m", "count"), [(4, 8, "116,963,796,250"), (2, 8, "187,530,840"), (3, 8, "24,046,189,440")]
)
def test_enumerate_says_how_many_masks_are_too_many(n: int, m: int, count: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)8x8.* {count} masks.*method='exact'"):
        ms.solve_block(np.ones((m, m)), n, m, method="enumerate")


@pytest.mark.slow
@READINGS
def test_enumerate_refuses_tiles_whose_masks_cannot_even_be_counted(saturated: bool) -> None:
    with pytest.raises(ValueError, match=r"32x32 .*method='exact'"):
        ms.solve_block(np.ones((32, 32)), 16, 32, method="enumerate", saturated=saturated)


@pytest.mark.parametrize("method", EXACT_METHODS, ids=str)
@pytest.mark.parametrize("step", [1, -1])
def test_sums_beyond_float64_are_compared_all_the_same(method: Method, step: int) -> None:
    weights = np.array([[1.7e308, 1.5e308], [1.5e308, 1.6e308]])
    assert (solve(method, weights[::step], 1, 2) == np.eye(2)[::step]).all()


@pytest.mark.parametrize("method", [*EXACT_METHODS, Method("greedy"), Method("two-approx")], ids=str)
def test_signs_are_not_mistaken_for_importance_by_any_method(method: Method) -> None:
    weights = np.array([[-9, 1, 1], [1, -9, 1], [1, 1, -9]])
    assert (solve(method, weights, 1, 3) == np.eye(3)).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_the_absolute_value_of_the_lowest_integer_is_not_negative(dtype: Any) -> None:
    weights = np.array([[np.iinfo(dtype).min, 0], [0, 0]], dtype)
    assert ms.solve_block(weights, 1, 2)[0, 0]


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65504.0), ("bfloat16", (2 - 2**-7) * 2.0**127)])
def test_small_floats_do_not_overflow_in_sums(dtype: str, largest: float) -> None:
    weights = np.array([[largest, largest, 0], [largest, largest, largest], [0, largest, largest]])
    weights = weights.astype(dtype_of(dtype))
    assert weights.max() == largest
    assert ms.certify(weights, ms.solve_block(weights, 2, 3), 2, 3).kept == 6 * largest
