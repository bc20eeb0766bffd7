"""The judge of single lines: beside the slow and obvious, however lines lie, and its machine code beside the kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from masksolve import _translated
from masksolve._judge import lines
from tests import processes
from tests.methods.test_lines import LAYOUTS

Masks = NDArray[np.bool_]
# n and length; the last is longer than what there is machine code for.
LENGTHS = [(0, 2), (1, 1), (1, 2), (2, 4), (2, 5), (3, 8), (7, 13), (16, 32), (5, 64), (20, 65)]
# Few lines, and many along either axis.
SHAPES = [(1, 1), (2, 37), (37, 2), (9, 16)]


def some_lines(p: int, q: int, n: int, length: int, dtype: Any, seed: int) -> tuple[NDArray[Any], Masks]:
    """Lines of which some tie, some are small and some zero; masks that are optimal, nearly so, or anything."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((p, q, 1)) < 0.5, rng.integers(-3, 4, (p, q, length)), rng.standard_normal(length))
    smallest = np.finfo(dtype).smallest_subnormal
    values = np.where(rng.random((p, q, 1)) < 0.2, smallest * rng.integers(-2, 3, (p, q, length)), values)
    given = (values * (rng.random((p, q, 1)) < 0.9)).astype(dtype)
    order = np.argsort(rng.random(values.shape) / 4 - np.abs(given), axis=2)
    masks = np.zeros(values.shape, np.bool_)
    np.put_along_axis(masks, order[:, :, :n], True, axis=2)
    others = np.take_along_axis(masks, rng.permuted(np.broadcast_to(np.arange(length), values.shape), axis=2), axis=2)
    masks = np.where(rng.random((p, q, 1)) < 0.3, others, masks)
    return given, masks & (rng.random((p, q, 1)) < 0.9) & (rng.random(values.shape) < 0.95)


def is_optimal(line: NDArray[Any], mask: Masks, n: int, exact: bool) -> bool:
    """The slow and obvious: what an optimal mask keeps, in descending order, zeros being worth nothing."""
    magnitudes = sorted((abs(float(value)) for value in line), reverse=True)[:n]
    kept = sorted((abs(float(value)) for value in line[mask]), reverse=True)
    if exact and len(kept) < n:
        return False
    return kept + [0.0] * (len(magnitudes) - len(kept)) == magnitudes


@cache
def judged_lines(
    p: int, q: int, n: int, length: int, dtype: Any, seed: int, exact: bool
) -> tuple[NDArray[Any], Masks, list[list[bool]]]:
    """Lines, masks, and whether they are optimal; the same for every layout."""
    given, masks = some_lines(p, q, n, length, dtype, seed)
    rows = zip(given, masks, strict=True)
    return given, masks, [[is_optimal(*each, n, exact) for each in zip(*row, strict=True)] for row in rows]


def judged(given: NDArray[Any], masks: Masks, n: int, exact: bool, shift: int = 0) -> tuple[bool, list[NDArray[Any]]]:
    out = [np.full(given.shape[:2], np.nan), np.full(given.shape[:2], np.nan), np.zeros(given.shape[:2], np.bool_)]
    can = lines.judge(given, masks, n, exact, shift, (out[0], out[1]), out[2])
    return can, out


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lines_are_judged_as_they_are_however_they_lie(
    layout: str, dtype: Any, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = set()
    for n, length in LENGTHS:
        for seed, (p, q) in enumerate(SHAPES):
            given, masks, expected = judged_lines(p, q, n, length, dtype, seed, exact)
            magnitudes = np.abs(given.astype(np.float64))
            for as_masks in (LAYOUTS[layout], np.ascontiguousarray):
                can, (importance, kept, optimal) = judged(LAYOUTS[layout](given), as_masks(masks), n, exact)
                assert can
                assert (optimal == expected).all(), (n, length, p, q)
                assert np.allclose(importance, magnitudes.sum(axis=2), rtol=1e-14, atol=0)
                assert np.allclose(kept, (magnitudes * masks).sum(axis=2), rtol=1e-14, atol=0)
            verdicts |= set(optimal.ravel())
            with monkeypatch.context() as without_machine_code:
                without_machine_code.setattr(_translated, "has_machine_code", False)
                _, again = judged(given, masks, n, exact)
            for ours, twin in zip((importance, kept, optimal), again, strict=True):
                assert np.array_equal(ours, twin), (n, length, p, q)
    assert verdicts == {True, False}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lines_that_cannot_be_judged_are_found_wherever_they_are(layout: str, dtype: Any) -> None:
    for n, length in LENGTHS:
        for p, q in SHAPES:
            given, masks = some_lines(p, q, n, length, dtype, 0)
            for where in [(0, 0), (p // 2, q // 2), (p - 1, q - 1)]:
                for k in {0, length // 2, length - 1}:
                    for value in (np.nan, np.inf, -np.inf, -np.nan):
                        wrong = given.copy()
                        wrong[(*where, k)] = value
                        assert not judged(LAYOUTS[layout](wrong), LAYOUTS[layout](masks), n, True)[0], (n, length, p)
                if n < length:
                    overfull = masks.copy()
                    overfull[where] = np.arange(length) <= n
                    assert not judged(LAYOUTS[layout](given), LAYOUTS[layout](overfull), n, False)[0], (n, length, p)


def test_sums_near_the_end_of_floats_are_scaled() -> None:
    for layout in LAYOUTS.values():
        given = layout(np.full((3, 40, 8), np.finfo(np.float64).max))
        masks = layout(np.broadcast_to(np.arange(8) < 4, given.shape))
        can, (importance, kept, optimal) = judged(given, masks, 4, True, 64)
        assert can
        assert optimal.all()
        assert np.isfinite(importance).all()
        assert (kept == importance / 2).all()


@processes.X86_64
@processes.EVERY_PROCESSOR
@processes.some_sizes([1, 3, 8], [33])
def test_lines_of_every_length_can_be_judged_on_every_kind_of_processor(processor: str, sizes: list[int]) -> None:
    modules = f"""
from masksolve._judge import lines

lines.VECTOR_BYTES = {64 if "avx512" in processor else 32}
for length in sizes:
    for itemsize in (4, 8):
        for side_by_side in (False, True):
            yield lines.write_module(length, itemsize, side_by_side)
"""
    processes.compile_for(processor, sizes, modules, optimised=False)
