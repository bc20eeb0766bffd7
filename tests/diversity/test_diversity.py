"""Counting masks: the values of the literature to the last digit, brute force, and the laws between counts."""

import itertools
import math
import subprocess
import sys
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from masksolve import Pattern, diversity
from masksolve._tiles import Margins
from masksolve.diversity import bits_per_weight, count, log2_count, mask_diversity
from masksolve.diversity._count import count_masks, counts_by_ones, log10_states, steps
from masksolve.diversity._paper_formula import paper_formula, paper_formula_ratio

UP_TO_12 = [(n, m) for m in range(1, 13) for n in range(m + 1)]

# OEIS A008300.
KNOWN = {
    (2, 4): 90,
    (3, 6): 297_200,
    (2, 8): 187_530_840,
    (3, 8): 24_046_189_440,
    (4, 8): 116_963_796_250,
    (5, 10): 6_736_218_287_430_460_752,
    (6, 12): 64_051_375_889_927_380_035_549_804_336,
    (2, 16): 36_574_751_938_491_748_341_360_000,
    (8, 16): 34_812_290_428_176_298_285_394_893_936_773_707_951_192_224_124_239_796_250,
}

# The paper's formula divided by the count, to the digits that are known.
FORMULA_RATIOS = {(2, 4): "1.6", (3, 6): "6.98", (2, 8): "1.084", (4, 8): "150.1", (6, 12): "8.0e+07"}
FORMULA_RATIOS |= {(2, 16): "0.748", (8, 16): "1.1e+19"}


def brute_force(rows: int, cols: int, n: int, exact_rows: bool, exact_columns: bool) -> list[int]:
    """Entry j: how many of all 0/1 matrices with j ones fit."""

    def fits(total: int, exact: bool) -> bool:
        return total == n if exact else total <= n

    lines = [line for line in itertools.product((0, 1), repeat=cols) if fits(sum(line), exact_rows)]
    found = np.zeros(rows * cols + 1, np.int64)
    for first in lines:
        sums = np.array([first], np.int8)
        for _ in range(rows - 1):
            sums = (sums[:, np.newaxis] + np.array(lines, np.int8)).reshape(-1, cols)
        valid = (sums == n if exact_columns else sums <= n).all(axis=1)
        found += np.bincount(sums[valid].sum(axis=1), minlength=len(found))
    return found.tolist()


@pytest.mark.parametrize("pattern", KNOWN, ids=str)
def test_counts_are_those_of_the_literature(pattern: tuple[int, int]) -> None:
    assert count(*pattern) == KNOWN[pattern]


@pytest.mark.parametrize("m", [1, 2, 5, 12, 20])
def test_masks_with_one_entry_a_line_are_permutations(m: int) -> None:
    assert count(1, m) == math.factorial(m)


@pytest.mark.parametrize("m", [2, 3, 7, 32])
def test_two_a_line_follow_their_own_recurrence(m: int) -> None:
    # OEIS A001499: a(m) = m (m - 1) / 2 (2 a(m - 1) + (m - 1) a(m - 2)).
    previous, current = 1, 0
    for k in range(2, m + 1):
        previous, current = current, k * (k - 1) * (2 * current + (k - 1) * previous) // 2
    assert count(2, m) == current


@pytest.mark.parametrize(
    ("n", "m"),
    [
        # Tens of millions of matrices are listed for the last ones.
        pytest.param(n, m, marks=[pytest.mark.slow] if m == 5 and n > 2 else [])
        for n, m in UP_TO_12
        if m <= 5
    ],
    ids=str,
)
def test_counts_are_those_of_brute_force(n: int, m: int) -> None:
    assert count(n, m) == sum(brute_force(m, m, n, True, True))
    assert count(n, m, saturated=False) == sum(brute_force(m, m, n, False, False))


@pytest.mark.parametrize("exact_rows", [False, True])
@pytest.mark.parametrize("exact_columns", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (3, 2), (4, 3)], ids=str)
def test_ragged_tiles_are_counted_like_brute_force(
    shape: tuple[int, int], exact_rows: bool, exact_columns: bool
) -> None:
    rows, cols = shape
    most = min([5, *[cols] * exact_rows, *[rows] * exact_columns])
    found = [count_masks(rows, cols, Margins(n, exact_rows, exact_columns)) for n in range(most + 1)]
    assert found == [sum(brute_force(rows, cols, n, exact_rows, exact_columns)) for n in range(most + 1)]


@pytest.mark.parametrize(("n", "m"), [(0, 2), (1, 3), (2, 4), (3, 4), (4, 4), (2, 5)], ids=str)
def test_counts_by_number_of_ones_are_those_of_brute_force(n: int, m: int) -> None:
    expected = brute_force(m, m, n, False, False)
    assert counts_by_ones(m, n) == tuple(expected[: m * n + 1])
    assert not any(expected[m * n + 1 :])


@pytest.mark.parametrize(("n", "m"), UP_TO_12, ids=str)
def test_exchanging_ones_and_zeros_keeps_the_number_of_masks(n: int, m: int) -> None:
    # Not through `count`, which uses this law.
    kept, zeros = Margins(n, True, True), Margins(m - n, True, True)
    assert count_masks(m, m, kept) == count_masks(m, m, zeros) == count(n, m)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8), (2, 9)], ids=str)
def test_masks_with_at_most_n_include_those_with_exactly_n_and_with_at_most_n_minus_one(n: int, m: int) -> None:
    assert counts_by_ones(m, n)[-1] == count(n, m)
    assert count(n, m, saturated=False) >= count(n, m) + count(n - 1, m, saturated=False)


def test_at_most_two_a_line_is_the_known_sequence() -> None:
    # OEIS A197458.
    assert [count(2, m, saturated=False) for m in range(2, 7)] == [16, 265, 7343, 304_186, 17_525_812]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (12, 12)], ids=str)
@pytest.mark.parametrize("direction", ["rows", "columns"])
def test_one_sided_counts_are_a_power_of_the_count_of_one_line(n: int, m: int, direction: str) -> None:
    assert count(n, m, direction=direction) == math.comb(m, n) ** m
    lines = sum(sum(line) <= n for line in itertools.product((0, 1), repeat=m))
    assert count(n, m, direction=direction, saturated=False) == lines**m


def test_every_matrix_keeps_at_most_m_of_m() -> None:
    assert count(20, 20, saturated=False) == 2**400
    assert count(20, 20) == count(0, 20) == 1


def seconds(n: int, m: int, saturated: bool) -> float:
    count_masks.cache_clear()
    start = time.process_time()
    count(n, m, saturated=saturated)
    return time.process_time() - start


@pytest.mark.slow
@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize("n", range(13))
def test_every_pattern_up_to_12_is_counted_in_a_second(n: int, saturated: bool) -> None:
    assert seconds(n, 12, saturated) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m", "limit"), [(8, 16, 10), (4, 16, 1), (2, 32, 1)])
def test_large_patterns_are_counted_in_time(n: int, m: int, limit: float) -> None:
    assert seconds(n, m, True) < limit


@pytest.mark.parametrize("saturated", [True, False])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (5, 11), (6, 12), (4, 16), (2, 32), (3, 24)], ids=str)
def test_the_estimated_cost_is_within_a_factor_of_three(n: int, m: int, saturated: bool) -> None:
    visited = sum(len(states) for _, _, states in steps(m - m // 2, m, n, saturated))
    assert 1 / 3 < 10 ** log10_states(m, m, Margins(n, saturated, saturated)) / visited < 3


@pytest.mark.parametrize(
    ("n", "m", "saturated", "cost"),
    [
        (16, 32, True, "4.6e\\+12 states and take about 5.3e\\+06 s"),
        (8, 16, False, "1.7e\\+07 states and take about 18 s"),
        (2, 3000, True, "2.7e\\+06 states and take about 32 s"),
        (500, 1000, True, "1e414 states and take about 1e410 s"),
    ],
)
def test_a_count_out_of_reach_is_refused_at_once_with_its_cost(n: int, m: int, saturated: bool, cost: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"{n}:{m} would visit about {cost}.*more than 10 s") as refusal:
        count(n, m, saturated=saturated)
    assert time.perf_counter() - start < 1
    # There is an approximation for exactly n only.
    assert ("log2_count" in str(refusal.value)) == saturated


@pytest.mark.parametrize("pattern", [*KNOWN, (3, 3), (0, 5), (4, 16)], ids=str)
def test_log2_count_is_the_logarithm_of_the_count_where_that_is_known(pattern: tuple[int, int]) -> None:
    found = log2_count(*pattern)
    assert found.exact
    assert found.value == math.log2(count(*pattern))


@pytest.mark.parametrize(
    ("n", "m", "ratio"), [(2, 4, "1.0086"), (4, 8, "1.0038"), (8, 16, "1.0010")], ids=["2:4", "4:8", "8:16"]
)
def test_the_asymptotic_formula_is_off_by_what_was_found_elsewhere(n: int, m: int, ratio: str) -> None:
    error = log2_count(n, m).error
    assert error is not None
    assert f"{2**error:.4f}" == ratio


@pytest.mark.parametrize("pattern", [(1, 2), (1, 3), (1, 4)], ids=str)
def test_the_asymptotic_formula_gets_better_as_tiles_grow(pattern: tuple[int, int]) -> None:
    n, m = pattern
    found = [log2_count(k * n, k * m).error for k in range(1, 6)]
    errors = [abs(error) for error in found if error is not None]
    assert len(errors) == 5
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


def test_beyond_counting_the_asymptotic_formula_answers_and_says_so() -> None:
    found = log2_count(16, 32)
    assert not found.exact
    assert found.error is None
    assert f"{10 ** (found.value * math.log10(2) - 254):.2f}" == "9.77"


def test_one_sided_logarithms_are_exact_at_any_size() -> None:
    assert log2_count(16, 32, direction="rows") == diversity.Log2Count(32 * math.log2(math.comb(32, 16)), True, None)


def test_the_tables_of_the_paper_and_the_true_order() -> None:
    one_sided = mask_diversity("2:4", 64, direction="rows")
    transposable = mask_diversity((4, 8), 64)
    assert f"{one_sided:.1e}" == "2.8e+12"
    assert f"{paper_formula(4, 8):.1e}" == "1.8e+13"  # the paper cuts 1.756e13 to 1.7e13
    assert transposable == 116_963_796_250 < one_sided < paper_formula(4, 8)


@pytest.mark.parametrize(
    ("direction", "bits"),
    [
        ("rows", {(1, 2): ".500", (2, 4): ".646", (4, 8): ".766", (8, 16): ".853"}),
        ("both", {(2, 4): ".406", (4, 8): ".574", (8, 16): ".721"}),
        ("unstructured", {(1, 2): "1.000", (3, 4): ".811", (1, 4): ".811", (4, 4): ".000"}),
    ],
)
def test_bits_per_weight(direction: str, bits: dict[tuple[int, int], str]) -> None:
    assert {pair: f"{bits_per_weight(*pair, direction=direction):.3f}".removeprefix("0") for pair in bits} == bits


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 8), (8, 16), (16, 32)], ids=str)
def test_each_further_constraint_leaves_fewer_masks(n: int, m: int) -> None:
    unstructured = bits_per_weight(n, m, direction="unstructured")
    assert bits_per_weight(n, m) < bits_per_weight(n, m, direction="rows") < unstructured
    assert bits_per_weight(n, m, direction="rows") == bits_per_weight(n, m, direction="columns")


@pytest.mark.parametrize("direction", ["both", "rows", "columns", "unstructured"])
def test_bits_per_weight_times_size_is_the_logarithm_of_the_diversity(direction: str) -> None:
    size = 64 * 300
    log2 = math.log2(mask_diversity("2:8", size, direction=direction))
    # Unstructured, bits per weight are those of the limit of large tensors.
    assert log2 == pytest.approx(
        size * bits_per_weight(2, 8, direction=direction), rel=1e-3 if direction == "unstructured" else 1e-12
    )


def test_the_diversity_of_a_tensor_multiplies_over_its_tiles() -> None:
    pattern = Pattern(2, 4)
    assert mask_diversity(pattern, 64) == 90**4
    assert mask_diversity(pattern, 12, direction="columns") == 6**3
    assert mask_diversity("1:3", 6, direction="unstructured") == 15


@pytest.mark.parametrize("pattern", FORMULA_RATIOS, ids=str)
def test_the_papers_formula_is_wrong_by_the_known_ratio(pattern: tuple[int, int]) -> None:
    digits = FORMULA_RATIOS[pattern]
    ratio = paper_formula_ratio(*pattern)
    assert float(f"{ratio:.{len(digits.split('e')[0].replace('.', '').lstrip('0')) - 1}e}") == float(digits)
    assert ratio == pytest.approx(float(Fraction(paper_formula(*pattern), count(*pattern))))


def test_the_papers_formula_is_right_for_one_entry_a_line() -> None:
    assert [paper_formula_ratio(1, m) for m in (1, 2, 8, 12)] == [1.0] * 4


def test_the_papers_formula_exceeds_the_number_of_all_matrices() -> None:
    assert paper_formula(16, 32) > 2 ** (32 * 32)
    assert math.log10(paper_formula_ratio(16, 32)) == pytest.approx(139.83, abs=0.01)
    assert paper_formula_ratio(64, 128) == math.inf


def test_a_logarithm_is_a_number_and_a_dictionary() -> None:
    found = log2_count(2, 4)
    assert float(found) == found.value == pytest.approx(math.log2(90))
    assert found.to_dict() == {"value": found.value, "exact": True, "error": found.error}


BAD: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (count, (9, 8), {}, ValueError, "n=9"),
    (count, (-1, 8), {}, ValueError, "n=-1"),
    (count, (0, 0), {}, ValueError, "m=0"),
    (count, (True, 8), {}, TypeError, "True"),
    (count, (2.0, 4), {}, TypeError, "2.0"),
    (count, (2, 4), {"direction": "row"}, ValueError, "'row'.*did you mean 'rows'"),
    (count, (2, 4), {"direction": "unstructured"}, ValueError, "'unstructured'"),
    (log2_count, (9, 8), {}, ValueError, "n=9"),
    (log2_count, (2, 4), {"direction": None}, ValueError, "None"),
    (bits_per_weight, (2, 4), {"direction": "unstrctured"}, ValueError, "did you mean 'unstructured'"),
    (mask_diversity, (4, 64), {}, TypeError, '"N:M".*got 4'),
    (mask_diversity, ("48", 64), {}, ValueError, "'48'"),
    (mask_diversity, (Pattern(4, 8), 100), {}, ValueError, "100 weights.*8x8 tiles.*multiple of 64"),
    (mask_diversity, (Pattern(4, 8), 100), {"direction": "rows"}, ValueError, "groups of 8.*multiple of 8"),
    (mask_diversity, (Pattern(2, 8), 6), {"direction": "unstructured"}, ValueError, "keeps 1.5.*multiple of 4"),
    (mask_diversity, (Pattern(4, 8), 0), {}, ValueError, "size must be at least 1, got 0"),
    (mask_diversity, (Pattern(4, 8), -64), {}, ValueError, "got -64"),
    (mask_diversity, (Pattern(4, 8), 64.0), {}, TypeError, "64.0"),
    (mask_diversity, (Pattern(4, 8), True), {}, TypeError, "True"),
    (mask_diversity, (Pattern(4, 8), 64), {"direction": "diagonal"}, ValueError, "'diagonal'"),
    (mask_diversity, (Pattern(16, 32), 1024), {}, ValueError, "16:32 would visit"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    BAD,
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_bad_input_is_refused_by_name(
    function: Any, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_numpy_integers_count_as_integers() -> None:
    assert count(np.int64(2), np.uint8(4)) == 90
    assert mask_diversity(Pattern(2, 4), np.int32(16)) == 90


def test_importing_and_counting_load_nothing_beyond_numpy() -> None:
    script = (
        "import masksolve, sys; masksolve.diversity.count(4, 8); print(*{name.split('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"numba", "scipy", "ortools", "torch", "matplotlib"} & set(loaded)
