"""The tables of what is tested: methods, patterns and families of weights. N != M/2 in every table."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.extras import dtype_of

Pair = tuple[int, int]
Weights = NDArray[Any]

# n:m, n kept of every m.
PATTERNS: list[Pair] = [
    (1, 1),
    (1, 2),
    (1, 4),
    (2, 4),
    (3, 4),
    (2, 5),
    (3, 6),
    (3, 8),
    (4, 8),
    (5, 8),
    (7, 13),
    (8, 16),
    (16, 32),
    (5, 64),
]
SMALL_PATTERNS = [(n, m) for n, m in PATTERNS if m <= 8]
TINY_PATTERNS = [(n, m) for n, m in PATTERNS if m <= 4]


def name_of(pair: Pair) -> str:
    return f"{pair[0]}:{pair[1]}"


def spread(*axes: Iterable[Any], one_in: int) -> list[Any]:
    """All combinations of the axes' values, for `parametrize`: one of every `one_in` by default, and the others slow.

    Those by default lie on diagonals, so that every value of an axis meets values all along the others.
    """
    cases = []
    for case in itertools.product(*map(enumerate, axes)):
        places, values = zip(*case, strict=True)
        marks = [pytest.mark.slow] if sum(places) % one_in else []
        names = [name_of(value) if isinstance(value, tuple) else str(value) for value in values]
        cases.append(pytest.param(*values, marks=marks, id="-".join(names)))
    return cases


def patterns_and_families(one_in: int) -> list[Any]:
    """Pairs of the two tables, spread; of the largest tiles none in float64, for whose code LLVM takes ten seconds."""

    def is_double(family: str) -> bool:
        if family == "gaussian bfloat16":  # its dtype is an optional library's, which collecting tests must not need
            return False
        dtype = weights_of(family, (1, 1)).dtype
        return dtype.kind in "fi" and dtype.itemsize == 8

    cases = spread(PATTERNS, FAMILIES, one_in=one_in)
    return [
        pytest.param(*case.values, marks=[pytest.mark.slow], id=case.id)
        if case.values[0][1] > 32 and is_double(case.values[1])
        else case
        for case in cases
    ]


@dataclass(frozen=True)
class Method:
    """A way to call the solver, and how far it may fall short of the optimum.

    `resolution`: a share of the largest weight of the tile, as the method's module states it. All of them are exact
    on integers of a few bits.
    """

    name: str
    resolution: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    slow: bool = False

    def can_do(self, pair: Pair) -> bool:
        """Whether the masks of a tile can be listed at all, and solvers that take milliseconds finish in time."""
        n, m = pair
        if self.name == "enumerate":
            return m <= 4 or (n, m) == (2, 5)
        return m <= 16 if self.slow else True

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.options.values())])


EXACT = Method("exact")
EXACT_METHODS = [
    EXACT,
    Method("flow", resolution=1e-12),
    Method("lp", resolution=1e-12),
    Method("lp", resolution=1e-9, options={"backend": "pulp"}, slow=True),
    Method("enumerate", resolution=1e-14),
]
APPROXIMATE_METHODS = [Method("greedy"), Method("greedy", options={"complete": True}), Method("two-approx")]


def _gaussian(rng: np.random.Generator, shape: tuple[int, ...]) -> Weights:
    return rng.standard_normal(shape)


def _half_zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Weights:
    return (rng.standard_normal(shape) * rng.integers(0, 2, shape)).astype(np.float32)


def _near_ties(rng: np.random.Generator, shape: tuple[int, ...]) -> Weights:
    """Float64 that differ in their last two bits only."""
    return 1.0 + rng.integers(0, 4, shape) * 2.0**-52


def _many_equal_rows(rng: np.random.Generator, shape: tuple[int, ...]) -> Weights:
    """Rows of float32, each like one of three."""
    rows = _gaussian(rng, (*shape[:-2], 3, shape[-1])).astype(np.float32)
    return rows[..., rng.integers(0, 3, shape[-2]), :]


FAMILIES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], Weights]] = {
    "gaussian float32": lambda rng, shape: _gaussian(rng, shape).astype(np.float32),
    "gaussian float64": _gaussian,
    "gaussian float16": lambda rng, shape: _gaussian(rng, shape).astype(np.float16),
    "gaussian bfloat16": lambda rng, shape: _gaussian(rng, shape).astype(dtype_of("bfloat16")),
    "student-t": lambda rng, shape: rng.standard_t(2, shape).astype(np.float32),
    "int8": lambda rng, shape: rng.integers(-128, 128, shape).astype(np.int8),
    "uint8": lambda rng, shape: rng.integers(0, 4, shape).astype(np.uint8),
    "int64": lambda rng, shape: rng.integers(-(2**53), 2**53, shape),
    "half zero": _half_zero,
    "nearly all zero": lambda rng, shape: (rng.random(shape) < 0.1).astype(np.float32),
    "constant": lambda rng, shape: np.full(shape, -0.1),
    "all zero": lambda rng, shape: np.zeros(shape, np.float32),
    "negative zero": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
    "negative": lambda rng, shape: -rng.random(shape).astype(np.float32),
    "tiny": lambda rng, shape: (_gaussian(rng, shape) * 1e-30).astype(np.float32),
    "huge": lambda rng, shape: (_gaussian(rng, shape) * 1e30).astype(np.float32),
    "largest": lambda rng, shape: np.finfo(np.float64).max * (1 - rng.integers(0, 4, shape) * 2.0**-50),
    "mixed magnitudes": lambda rng, shape: 10.0 ** rng.uniform(-30, 30, shape),
    "all magnitudes": lambda rng, shape: 10.0 ** rng.uniform(-323, 308, shape),
    "subnormal float64": lambda rng, shape: rng.integers(0, 5, shape) * 5e-324,
    "subnormal float32": lambda rng, shape: (rng.integers(-5, 5, shape) * 1.4e-45).astype(np.float32),
    "near ties": _near_ties,
    "equal rows": lambda rng, shape: np.repeat(_gaussian(rng, (*shape[:-2], 1, shape[-1])), shape[-2], -2),
    "equal columns": lambda rng, shape: np.repeat(_gaussian(rng, (*shape[:-1], 1)), shape[-1], -1),
    "many equal rows": _many_equal_rows,
    "tenths": lambda rng, shape: rng.integers(0, 8, shape) * 0.1,
}
# In these every sum of differences is far above every method's resolution.
COARSE_FAMILIES = ["int8", "uint8", "nearly all zero", "constant", "all zero", "negative zero", "subnormal float64"]
# In these methods in floating point may fall short by their resolution.
FINE_FAMILIES = ["gaussian float32", "gaussian float64", "student-t", "half zero", "tiny", "huge", "near ties"]


def weights_of(family: str, shape: tuple[int, ...], seed: int = 0) -> Weights:
    return FAMILIES[family](np.random.default_rng(seed), shape)
