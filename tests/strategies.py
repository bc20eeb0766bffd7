"""Hypothesis strategies for weights, layouts in memory, shapes and masks."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from tests.extras import dtype_of
from tests.tables import SMALL_PATTERNS

FLOATS = [np.dtype(code) for code in ("f2", "f4", "f8")]
if find_spec("ml_dtypes"):
    FLOATS.append(dtype_of("bfloat16"))
INTEGERS = [np.dtype(code) for code in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")]

patterns = st.sampled_from(SMALL_PATTERNS)
dtypes = st.sampled_from(FLOATS + INTEGERS)
readings = st.booleans()
directions = st.sampled_from(["both", "rows", "columns"])


def elements(dtype: np.dtype[Any]) -> st.SearchStrategy[float | int]:
    """Finite numbers that the dtype holds exactly, of any magnitude."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return st.integers(max(info.min, -(2**53)), min(info.max, 2**53))
    if dtype.name == "bfloat16":
        # Any 16 bits with less than all ones in the exponent are finite.
        bits = st.integers(0, 2**16 - 1).filter(lambda b: b & 0x7F80 != 0x7F80)
        return bits.map(lambda b: float(np.uint16(b).view(dtype)))
    return st.floats(width=dtype.itemsize * 8, allow_nan=False, allow_infinity=False)


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...]) -> NDArray[Any]:
    """Arrays of any dtype: all entries different, or few different values and many ties, or nearly equal ones."""
    dtype = draw(dtypes)
    kind = draw(st.sampled_from(["any", "palette", "few bits", "near ties"]))
    if kind == "near ties":
        steps = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))
        return 1.0 + steps * 2.0**-52
    if kind == "few bits":
        few = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))
        return few.astype(dtype)
    entry = elements(dtype)
    if kind == "palette":
        entry = st.sampled_from(draw(st.lists(entry, min_size=1, max_size=4)))
    values = draw(hnp.arrays(object, shape, elements=entry))
    return values.astype(dtype)


class Problem(NamedTuple):
    weights: NDArray[Any]
    n: int
    m: int
    saturated: bool


@st.composite
def tiles(draw: st.DrawFn, patterns: st.SearchStrategy[tuple[int, int]] = patterns) -> Problem:
    """One m x m block."""
    n, m = draw(patterns)
    return Problem(draw(arrays((m, m))), n, m, draw(readings))


@st.composite
def matrices(draw: st.DrawFn, patterns: st.SearchStrategy[tuple[int, int]] = patterns) -> Problem:
    """A matrix of any shape, ragged more often than not, or a stack of them."""
    n, m = draw(patterns)
    lead = draw(st.sampled_from([(), (), (1,), (2,), (2, 1)]))
    sides = st.integers(1, 11)
    return Problem(draw(arrays((*lead, draw(sides), draw(sides)))), n, m, draw(readings))


def _unaligned(array: NDArray[Any]) -> NDArray[Any]:
    buffer = np.empty(array.nbytes + 1, np.uint8)
    view = buffer[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _spread(array: NDArray[Any]) -> NDArray[Any]:
    """Every third column and every second row of a larger array."""
    large = np.ones((*array.shape[:-2], array.shape[-2] * 2, array.shape[-1] * 3), array.dtype)
    large[..., ::2, ::3] = array
    return large[..., ::2, ::3]


# The same numbers in other places of memory.
LAYOUTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "contiguous": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "transposed": lambda array: array.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "negative strides": lambda array: array[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
    "rows reversed": lambda array: array[..., ::-1, :].copy()[..., ::-1, :],
    "spread": _spread,
    "read-only": _read_only,
    "unaligned": _unaligned,
    "byte-swapped": lambda array: array if array.dtype.name == "bfloat16" else array.astype(array.dtype.newbyteorder()),
}
layouts = st.sampled_from(sorted(LAYOUTS))


def saturated_mask(rng: np.random.Generator, n: int, m: int) -> NDArray[np.bool_]:
    """A mask with exactly n ones a line: a circulant, rows and columns shuffled."""
    steps = (np.arange(m)[:, None] - np.arange(m)) % m
    return (steps < n)[rng.permutation(m)][:, rng.permutation(m)]
