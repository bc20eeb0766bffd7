"""The judge behind certify: beside the integers, and its machine code beside plain Numba."""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import masksolve as ms
from masksolve import _translated
from masksolve._certificate import TileCertificates, certified_regions, scale_shift
from masksolve._judge import grid, inner_loops
from masksolve._judge.interface import EXACT_COLUMNS, EXACT_ROWS, OUTPUTS, OVERFULL, WITHOUT_ZEROS, Program
from masksolve._methods.exact import solve_importance
from masksolve._tiles import Margins
from tests import processes
from tests.tables import FAMILIES, PATTERNS, Pair, name_of, spread, weights_of

READINGS = pytest.mark.parametrize("saturated", [True, False], ids=["exactly", "at-most"])
SOME_PATTERNS = [(1, 2), (1, 4), (2, 4), (2, 5), (3, 8), (5, 8), (7, 13), (8, 16)]
TIES = ["int8", "uint8", "half zero", "nearly all zero", "constant", "all zero", "gaussian bfloat16"]

Masks = NDArray[np.bool_]


def certified(weights: NDArray[Any], masks: Masks, pattern: Pair, saturated: bool) -> TileCertificates:
    """The certificates of a batch of tiles."""
    with np.errstate(all="ignore"):
        ((_, found),) = certified_regions(weights, masks, ms.Pattern(*pattern), "both", saturated, scale_shift(weights))
    return found


def of_a_permuted_tile(weights: NDArray[Any], n: int, m: int, saturated: bool, rng: np.random.Generator) -> Masks:
    """Optimal masks, of which those of weights that tie are others than the solver's own."""
    rows, columns = rng.permutation(m)[:, np.newaxis], rng.permutation(m)
    masks = np.empty(weights.shape, np.bool_)
    masks[:, rows, columns] = ms.solve_blocks(weights[:, rows, columns], n, m, saturated=saturated)
    return masks


def with_an_exchange(weights: NDArray[Any], n: int, m: int, saturated: bool, rng: np.random.Generator) -> Masks:
    """Optimal masks in which two ones of each tile have moved within their rows, so that margins stay."""
    masks = ms.solve_blocks(weights, n, m, saturated=saturated)
    for mask in masks:
        for _ in range(50):
            (i, k), (j, other) = rng.integers(0, m, (2, 2))
            if mask[i, j] and mask[k, other] and not mask[i, other] and not mask[k, j]:
                mask[[i, k, i, k], [j, other, other, j]] = False, False, True, True
                break
    return masks


def of_weights_off_by_a_last_bit(
    weights: NDArray[Any], n: int, m: int, saturated: bool, rng: np.random.Generator
) -> Masks:
    """Masks that are optimal, or nearly so: some weights have another last bit."""
    if weights.dtype.kind != "f" or weights.dtype.itemsize < 4:
        return ms.solve_blocks(weights, n, m, saturated=saturated)
    towards = weights.dtype.type(0)
    changed = np.where(rng.random(weights.shape) < 0.3, np.nextafter(weights, towards), weights)
    return ms.solve_blocks(changed, n, m, saturated=saturated)


def short_of_some(weights: NDArray[Any], n: int, m: int, saturated: bool, rng: np.random.Generator) -> Masks:
    masks = ms.solve_blocks(weights, n, m, saturated=saturated)
    drawn: Masks = masks & (rng.random(masks.shape) < 0.95)
    return drawn


def of_the_other_reading(weights: NDArray[Any], n: int, m: int, saturated: bool, rng: np.random.Generator) -> Masks:
    return ms.solve_blocks(weights, n, m, saturated=not saturated)


def greedy(weights: NDArray[Any], n: int, m: int, saturated: bool, rng: np.random.Generator) -> Masks:
    return ms.solve_blocks(weights, n, m, method="greedy", saturated=saturated)


MASKS: list[Callable[..., Masks]] = [
    of_a_permuted_tile,
    with_an_exchange,
    of_weights_off_by_a_last_bit,
    short_of_some,
    of_the_other_reading,
    greedy,
]


@READINGS
@pytest.mark.parametrize(("pattern", "family"), spread(SOME_PATTERNS, FAMILIES, one_in=3))
def test_masks_are_judged_as_the_integers_do(pattern: Pair, family: str, saturated: bool) -> None:
    n, m = pattern
    weights = weights_of(family, (6, m, m))
    importance = np.abs(weights.astype(np.float64))
    for number, make in enumerate(MASKS):
        masks = make(weights, n, m, saturated, np.random.default_rng(number))
        best, _, expected = solve_importance(
            importance[np.newaxis], Margins(n, saturated, saturated), None, masks[np.newaxis]
        )
        found = certified(weights, masks, pattern, saturated)
        assert (found.optimal.ravel() == expected[0]).all(), make.__name__
        scaled = np.ldexp(importance, -scale_shift(weights))
        for values, chosen in ((found.kept, masks), (found.upper_bound, best[0]), (found.importance, True)):
            assert np.allclose(values.ravel(), (scaled * chosen).sum(axis=(1, 2)), rtol=1e-12, atol=0), make.__name__


@READINGS
@pytest.mark.parametrize(
    ("pattern", "family"),
    spread([(2, 4), (3, 8), (4, 8), (8, 16)], ["gaussian float32", "gaussian float64", "student-t", *TIES], one_in=3),
)
def test_potentials_of_the_solver_prove_nearly_all_masks_that_are_optimal(
    pattern: Pair, family: str, saturated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, m = pattern
    weights = weights_of(family, (400, m, m))
    left = []

    def judge_by_paths(tiles: NDArray[Any], masks: Masks, *rest: Any) -> None:
        left.append(len(rest[3][0]))
        by_paths(tiles, masks, *rest)

    by_paths = grid._judge_by_paths
    monkeypatch.setattr(grid, "_judge_by_paths", judge_by_paths)
    for make in (of_a_permuted_tile, greedy):
        certified(weights, make(weights, n, m, saturated, np.random.default_rng(0)), pattern, saturated)
    assert sum(left) <= 0.03 * 2 * len(weights)


JUDGED_SHAPES = [(2, 2), (4, 4), (8, 8), (3, 5), (6, 4), (13, 13), (16, 16), (20, 33)]


def found_by_the_judge() -> dict[str, list[str]]:
    """Return what `prove` and `weigh` return and write for tiles of all kinds, bit for bit."""
    families = ["gaussian float32", "half zero", "uint8", "all magnitudes", "all zero"]
    cases = itertools.product(JUDGED_SHAPES, families, [np.float32, np.float64])
    return {f"{shape}, {family}, {dtype.__name__}": outcomes(shape, family, dtype) for shape, family, dtype in cases}


def outcome(function: str, program: Program, *arguments: int) -> tuple[int, str]:
    out = np.full(OUTPUTS, -1.0)
    if _translated.has_machine_code:
        judge = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 8)(getattr(program, function))
        flags = judge(*arguments, out.ctypes.data)
    else:
        flags = getattr(inner_loops, function)(tuple(program), *arguments, out.ctypes.data)
    out[np.isnan(out)] = np.nan  # of which there are many
    return int(flags), out.tobytes().hex()


def outcomes(shape: Pair, family: str, dtype: Any) -> list[str]:
    rng = np.random.default_rng(0)
    rows, columns = shape
    program = inner_loops.program(*shape, np.dtype(dtype).itemsize)
    found = []
    for number in range(60):
        n = int(rng.integers(1, min(shape)))
        with np.errstate(over="ignore"):
            weights = np.ascontiguousarray(weights_of(family, shape, number)).astype(dtype)
        if number % 15 == 14:
            weights[0, 0] = rng.choice([np.nan, np.inf])
        mask = rng.random(shape) < 0.5
        if number % 2:
            mask = ms.solve_matrix(rng.random(shape), n, max(shape), method="greedy", saturated=False)
        with np.errstate(all="ignore"):
            kinds = [np.zeros(columns), rng.standard_normal(columns), weights.max() * rng.random(columns)]
            potentials = kinds[number % 3].astype(dtype)
        if number % 20 == 19:
            potentials[-1] = np.nan
        if number % 4 == 0:
            # Rows hold their n best, so that some are proven.
            with np.errstate(all="ignore"):
                best = np.argsort(potentials - np.abs(weights), axis=1)[:, :n]
            mask = np.zeros(shape, bool)
            np.put_along_axis(mask, best, True, axis=1)
        for flags in range(8):
            reading = n | sum(bit for k, bit in enumerate((EXACT_ROWS, EXACT_COLUMNS, WITHOUT_ZEROS)) if flags >> k & 1)
            places = weights.ctypes.data, weights.strides[0], mask.ctypes.data, mask.strides[0]
            given = *places, potentials.ctypes.data, rows, reading
            proven = outcome("prove", program, *given)
            found.append(f"prove {proven}")
            if np.isfinite(weights).all() and np.isfinite(potentials).all() and proven[0] & OVERFULL == 0:
                found.append(f"weigh {outcome('weigh', program, *given)}")
    return found


@pytest.mark.slow
@pytest.mark.skipif(not _translated.has_machine_code, reason="there is no machine code to compare with")
def test_machine_code_judges_as_plain_numba_bit_for_bit() -> None:
    script = """
import json
from tests.test_judge import found_by_the_judge
print(json.dumps(found_by_the_judge()))
"""
    expected = json.loads(processes.run(script, MASKSOLVE_PLAIN_NUMBA="1", NUMBA_OPT="1"))
    found = found_by_the_judge()
    assert found.keys() == expected.keys()
    for name, each in found.items():
        assert each == expected[name], name
        assert len({outcome.split(",")[0] for outcome in each}) > 3, name


@pytest.mark.parametrize("change", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pattern", [(2, 4), (3, 8)], ids=name_of)
def test_no_potential_that_is_not_finite_proves_anything(pattern: Pair, change: float) -> None:
    n, m = pattern
    weights = weights_of("int8", (50, m, m)).astype(np.float32)
    masks = ms.solve_blocks(weights, n, m)[:, ::-1]
    _, potentials = ms.solve_matrix(weights, n, m, return_potentials=True)
    expected = certified(weights, masks, pattern, True).optimal
    for column in range(m):
        changed = potentials.copy()
        changed[..., column] = change
        ((_, found),) = certified_regions(weights, masks, ms.Pattern(n, m), "both", True, 0, potentials=changed)
        assert (found.optimal == expected).all()


@pytest.mark.parametrize("direction", ["rows", "columns"])
@pytest.mark.parametrize(
    ("pattern", "family"),
    spread(PATTERNS[1:], ["gaussian float32", "half zero", "uint8", "all magnitudes", "largest"], one_in=3),
)
@READINGS
def test_one_sided_masks_are_optimal_where_lines_keep_their_largest_entries(
    pattern: Pair, direction: str, family: str, saturated: bool
) -> None:
    n, m = pattern
    weights = weights_of(family, (2 * m + 1, 3 * m - 1))
    mask = ms.solve_matrix(weights, n, m, direction=direction, saturated=saturated)
    found = ms.certify(weights, mask, n, m, direction=direction, saturated=saturated)
    assert found.optimal
    assert found.kept == found.upper_bound
    weights = weights_of("gaussian float64", weights.shape)
    mask = ms.solve_matrix(weights, n, m, direction=direction, saturated=saturated)
    lost = tuple(np.argwhere(mask)[-1])
    mask[lost] = False
    worse = ms.certify(weights, mask, n, m, direction=direction, saturated=saturated)
    assert not worse.optimal
    assert worse.upper_bound - worse.kept == pytest.approx(abs(weights[lost]))
