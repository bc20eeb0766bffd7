"""Checks what users hand in. Every refusal says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, SupportsIndex, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._pattern import as_integer
from masksolve._tiles import DIRECTIONS, Direction

# Importance is compared in float64, which holds every float up to 64 bits and every integer up to this.
LARGEST_INTEGER = 2**53
_CHUNK = 1 << 16

_Choice = TypeVar("_Choice", bound=str)


def as_weights(weights: ArrayLike, ndim: int | None = None) -> NDArray[Any]:
    """Return the weights as an array of real numbers, never copied when they are an array already."""
    array = as_array(weights, "weights are")
    dtype = array.dtype
    # One of the many 8-bit floats calls itself a float; all others are taken for raw bytes.
    is_real = (dtype.kind == "f" and 2 <= dtype.itemsize <= 8) or dtype.kind in "iu" or dtype.name == "bfloat16"
    if not is_real:
        hint = "; pass their absolute values to prune by magnitude" if dtype.kind == "c" else ""
        if dtype.name.startswith("float"):
            hint = "; convert them with astype(numpy.float32), which is exact" if dtype.itemsize == 1 else ""
        raise TypeError(
            f"weights have dtype {dtype}; allowed are float16, float32, float64, bfloat16 and integers{hint}"
        )
    if ndim is None and array.ndim < 2:
        raise ValueError(f"weights have shape {array.shape}; a matrix (..., R, C) has at least two dimensions")
    if ndim is not None and array.ndim != ndim:
        wanted = "(m, m)" if ndim == 2 else "(B, m, m)"
        raise ValueError(f"weights have shape {array.shape}; expected {ndim} dimensions, {wanted}")
    if array.size == 0:
        raise ValueError(f"weights have shape {array.shape}, which is empty; every dimension must be at least 1")
    return array


@cache
def potentials_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the floats in which method "exact" solves weights of a dtype: float32 where that holds them exactly."""
    is_narrow = dtype.itemsize <= (2 if dtype.kind in "iu" else 4)
    return np.dtype(np.float32 if is_narrow else np.float64)


def check_values(weights: NDArray[Any]) -> None:
    """Refuse NaN, infinities and integers that float64 cannot hold, naming the first by position."""
    if weights.dtype.kind in "iu" and weights.dtype.itemsize < 8:
        return
    for offset, chunk in chunks(weights):
        if weights.dtype.kind in "iu":
            bad = (chunk > LARGEST_INTEGER) | (chunk < -LARGEST_INTEGER)
            complaint = "integers beyond ±2**53 are not exact in float64; divide the weights by a power of two"
        else:
            bad = ~np.isfinite(chunk)
            complaint = "NaN and infinities have no importance; replace them first"
        if bad.any():
            where = np.argwhere(bad)[0]
            index = ", ".join(str(int(start + step)) for start, step in zip(offset, where, strict=True))
            raise ValueError(f"weights[{index}] is {chunk[tuple(where)]}; {complaint}")


def chunks(array: NDArray[Any]) -> Iterator[tuple[tuple[int, ...], NDArray[Any]]]:
    """Yield views of bounded size that cover the array, each with the index of its first entry."""
    size = array.size // array.shape[0]
    if size > _CHUNK and array.ndim > 1:
        for index, part in enumerate(array):
            for offset, chunk in chunks(part):
                yield (index, *offset), chunk[np.newaxis]
        return
    step = max(1, _CHUNK // size)
    for start in range(0, array.shape[0], step):
        yield (start, *[0] * (array.ndim - 1)), array[start : start + step]


def as_mask(mask: ArrayLike) -> NDArray[np.bool_]:
    """Return the mask as a boolean array; numbers are taken if all are 0 or 1."""
    array = as_array(mask, "the mask is")
    if array.ndim < 2:
        raise ValueError(f"the mask has shape {array.shape}; a mask (..., R, C) has at least two dimensions")
    if array.size == 0:
        raise ValueError(f"the mask has shape {array.shape}, which is empty; every dimension must be at least 1")
    if array.dtype.kind == "b":
        return array
    if not (array.dtype.kind in "iuf" or array.dtype.name == "bfloat16"):
        raise TypeError(f"the mask has dtype {array.dtype}; allowed are bool, or numbers that are all 0 or 1")
    as_bool = array.astype(np.bool_)
    odd = as_bool != array
    if odd.any():
        index = tuple(int(i) for i in np.argwhere(odd)[0])
        raise ValueError(f"mask[{', '.join(map(str, index))}] is {array[index]}; a mask holds only 0 and 1")
    return as_bool


def as_array(values: ArrayLike, what: str) -> NDArray[Any]:
    # NumPy would take what a masked array hides for entries like all others.
    if type(values) is not np.ndarray and isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{what} a masked array, which hides entries; pass an array, such as its filled(0)")
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"{what} a {type(values).__name__} that is not a rectangle of numbers ({error}); pass an array, or a list "
            "of rows of one length"
        ) from None


def check_flag(value: bool, name: str) -> None:
    """Refuse what is not True or False, though it may count as one of them."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(value: float, name: str) -> None:
    """Refuse what is not a real number; a bool does not count as one."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def check_seconds(value: float | None, name: str) -> None:
    """Refuse what is no time limit: a positive number of seconds, or None."""
    if value is None:
        return
    check_number(value, name)
    if not value > 0:
        raise ValueError(f"{name} must be positive, in seconds, got {value!r}; None sets none")


def check_choice(given: _Choice, name: str, allowed: Iterable[_Choice]) -> _Choice:
    """Return the one of the allowed strings that was given; `name` is what it is a choice of."""
    for choice in allowed:
        if isinstance(given, str) and given == choice:
            return choice
    raise ValueError(f"unknown {name} {given!r}{nearest(given, allowed)}")


def check_direction(direction: str) -> Direction:
    """Return the direction, one of "both", "rows", "columns"."""
    return check_choice(cast(Direction, direction), "direction", DIRECTIONS)


def check_threads(threads: int | None) -> None:
    """Refuse what is neither None nor a number of threads of at least 1."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, (int, np.integer))):
        raise TypeError(f"threads must be None or an integer, got {threads!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}; None uses every core this process may use")


def as_count(value: SupportsIndex, name: str, at_least: int) -> int:
    """Return a whole number of something, at least `at_least`."""
    number = as_integer(value, name)
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}")
    return number


def as_generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    """Return the generator that `rng` stands for: itself, one seeded with it, or one of fresh entropy."""
    if rng is None or isinstance(rng, np.random.Generator):
        return np.random.default_rng(rng)
    if isinstance(rng, (bool, np.bool_)) or not isinstance(rng, (int, np.integer)):
        raise TypeError(
            f"rng must be None, an integer seed or a numpy.random.Generator, got {rng!r} of type {type(rng).__name__}"
        )
    return np.random.default_rng(as_count(rng, "the seed rng", 0))


def nearest(given: object, allowed: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: what is allowed, and which of it was probably meant."""
    # Importing it takes as long as a tenth of the package, and few users mistype.
    import difflib

    names = list(allowed)
    close = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"; allowed are {', '.join(map(repr, names))}{meant}"
