"""One-sided masks: the largest entries of every group, whatever its length and wherever it lies."""

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from llvmlite import binding

import masksolve as ms
from masksolve._machine_code import target_machine
from masksolve._methods.exact.lines import choose_largest, plain
from masksolve._methods.exact.lines.codegen import write_module
from masksolve._networks import selection_network
from masksolve._tiles import Direction
from tests import processes
from tests.extras import dtype_of
from tests.tables import FAMILIES, Pair, Weights, spread, weights_of

# The last is longer than what is ranked by comparing pairs.
LENGTHS = [(2, 4), (3, 8), (7, 13), (5, 64), (20, 65)]
# Many groups along either axis, few of them, and a ragged end.
SHAPES = [(3, 1), (2, 70), (70, 2), (1, 1)]


def largest(weights: Weights, n: int, m: int) -> np.ndarray:
    """The slow and obvious: sort every group, of equal magnitudes the first comes first."""
    mask = np.zeros(weights.shape, np.bool_)
    for start in range(0, weights.shape[1], m):
        groups = np.abs(weights[:, start : start + m].astype(np.float64))
        largest_first = np.argsort(-groups, axis=1, kind="stable")
        np.put_along_axis(mask[:, start : start + m], largest_first[:, :n], True, axis=1)
    return mask


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize(("pattern", "family"), spread(LENGTHS, FAMILIES, one_in=2))
def test_every_group_keeps_its_largest_entries_and_of_equal_ones_the_first(
    pattern: Pair, family: str, direction: Direction
) -> None:
    n, m = pattern
    for seed, (rows, groups) in enumerate(SHAPES):
        weights = weights_of(family, (rows, groups * m + m // 3), seed)
        given = weights if direction == "rows" else weights.T
        mask = ms.solve_matrix(given, n, m, direction=direction)
        assert np.array_equal(mask if direction == "rows" else mask.T, largest(weights, n, m)), (rows, groups)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize("m", [4, 100])
def test_a_value_that_is_not_finite_is_named_wherever_it_is(m: int, direction: Direction, value: float) -> None:
    for where in [(0, 0), (7, 205), (8, 299)]:
        weights = np.ones((9, 300), np.float32)
        weights[where] = value
        with pytest.raises(ValueError, match=rf"weights\[{where[0]}, {where[1]}\] is {value}"):
            ms.solve_matrix(weights, 2, m, direction=direction)


DTYPES = ["float16", "bfloat16", "float32", "float64"]
# Lines (p, q, k) as a view of other memory of that shape, in another order.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "in a row": np.ascontiguousarray,
    "side by side": lambda lines: lines.swapaxes(1, 2).copy().swapaxes(1, 2),
    "side by side, turned": lambda lines: lines.T.copy().T,
    "in a row, turned": lambda lines: lines.swapaxes(0, 1).copy().swapaxes(0, 1),
    "in rows apart": lambda lines: np.repeat(lines, 2, axis=0)[::2],
    "apart": lambda lines: np.repeat(lines, 2, axis=2)[:, :, ::2],
    "backwards": lambda lines: lines[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
}


@cache
def some_lines(dtype: str, p: int, q: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Lines of which some tie and others do not, and in what order a stable sort puts their entries."""
    rng = np.random.default_rng(p + q + k)
    values = np.where(rng.random((p, q, 1)) < 0.5, rng.integers(-3, 4, (p, q, k)), rng.standard_normal((p, q, k)))
    lines = values.astype(dtype_of(dtype))
    return lines, np.argsort(-np.abs(lines.astype(np.float64)), axis=2, kind="stable")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lines_keep_their_largest_entries_however_they_lie(layout: str, dtype: str) -> None:
    for n, length in [(1, 2), (2, 4), (2, 5), (3, 8), (7, 13), (16, 32), (5, 64)]:
        for p, q in [(1, 1), (2, 70), (70, 2), (3, 129)]:
            values, order = some_lines(dtype, p, q, length)
            expected = np.zeros(values.shape, np.bool_)
            np.put_along_axis(expected, order[:, :, :n], True, axis=2)
            # Masks that lie as the lines do, and masks that lie otherwise.
            for as_masks in (LAYOUTS[layout], np.ascontiguousarray):
                masks = as_masks(~expected)
                assert choose_largest(LAYOUTS[layout](values), masks, n)
                assert np.array_equal(masks, expected), (n, length, p, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_entry_that_is_not_finite_is_found_however_lines_lie(layout: str, dtype: str) -> None:
    for p, q in [(1, 1), (2, 70), (70, 2), (3, 129)]:
        values, _ = some_lines(dtype, p, q, 5)
        assert choose_largest(LAYOUTS[layout](values), np.empty(values.shape, np.bool_), 5)
        for where in [(0, 0, 0), (p // 2, q // 2, 2), (p - 1, q - 1, 4)]:
            for value in (np.nan, np.inf, -np.inf):
                wrong = values.copy()
                wrong[where] = value
                for n in (2, 5):
                    assert not choose_largest(LAYOUTS[layout](wrong), np.empty(values.shape, np.bool_), n)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_plain_numba_chooses_the_same(dtype: str) -> None:
    for n, length in [(1, 2), (3, 8), (5, 64)]:
        for p, q in [(1, 1), (70, 2), (3, 129)]:
            values, _ = some_lines(dtype, p, q, length)
            masks, as_plain = np.empty(values.shape, np.bool_), np.empty(values.shape, np.bool_)
            assert choose_largest(values, masks, n)
            assert plain.choose(values, as_plain, n)
            assert np.array_equal(masks, as_plain)
            assert not plain.choose(np.full_like(values, np.nan), as_plain, n)


@processes.X86_64
@pytest.mark.parametrize(("itemsize", "instructions"), [(2, "p(?:min|max)sw"), (4, "p(?:min|max)sd")])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_selection_is_packed_min_and_max_of_integers_alone(
    side_by_side: bool, itemsize: int, instructions: str
) -> None:
    assembly = target_machine().emit_assembly(binding.parse_assembly(write_module(3, 7, itemsize, 8, side_by_side)))
    assert len(re.findall(rf"\bv?{instructions}\b", assembly)) == len(selection_network(3, 7).steps)


@processes.X86_64
@processes.EVERY_PROCESSOR
@processes.some_sizes([2, 3, 7, 16], [4, 33])
def test_lines_of_every_length_can_be_chosen_from_on_every_kind_of_processor(processor: str, sizes: list[int]) -> None:
    modules = f"""
from masksolve._methods.exact.lines import codegen

codegen.VECTOR_BYTES = {64 if "avx512" in processor else 32}
for length in sizes:
    for itemsize in (2, 4, 8):
        for side_by_side in (False, True):
            yield codegen.write_module(1, length, itemsize, 5, side_by_side)
"""
    processes.compile_for(processor, sizes, modules, optimised=False)
