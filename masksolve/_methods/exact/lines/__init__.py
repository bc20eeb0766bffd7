"""Tiles of a single line, which one-sided masks consist of: the largest entries, many lines at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Importing them says whether there is machine code.
import masksolve._methods.exact.inner_loops  # noqa: F401
from masksolve import _translated

if _translated.has_machine_code:
    from masksolve._methods.exact.lines import codegen
else:
    from masksolve._methods.exact.lines import plain

# Comparing all pairs, or a network, takes more per entry the longer a line is; in longer ones NumPy selects.
_LONGEST_IN_LANES = 64
# Entries of lines that are copied at once, because they lie neither side by side nor one after the other.
_COPIED = 1 << 17
_EXPONENT_BITS = {"float16": 5, "bfloat16": 8, "float32": 8, "float64": 11}


def takes(dtype: np.dtype[Any], length: int) -> bool:
    """Return whether `choose_largest` takes lines of this dtype and length as they are."""
    in_lanes = _translated.has_machine_code and length <= _LONGEST_IN_LANES
    return _exponent_bits(dtype) > 0 and (in_lanes or dtype.itemsize >= 4)


# NumPy takes longer to name a dtype than lines of a small matrix take.
@cache
def _exponent_bits(dtype: np.dtype[Any]) -> int:
    """Return how many bits the exponent of floats has; 0 for other numbers, and for those of other machines."""
    return _EXPONENT_BITS.get(dtype.name, 0) if dtype.isnative else 0


def choose_largest(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int) -> bool:
    """Fill masks (p, q, k) with the `kept` largest magnitudes of lines (p, q, k) of floats; of equal ones the first.

    Returns whether all entries are finite; the masks mean nothing otherwise.
    """
    length = lines.shape[2]
    if kept >= length:
        masks[...] = True
        return bool(np.isfinite(lines).all())
    if length > _LONGEST_IN_LANES:
        return _select(lines, masks, kept)
    if _translated.has_machine_code:
        return _choose_in_lanes(lines, masks, kept)
    return plain.choose(lines, masks, kept)


def _choose_in_lanes(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int) -> bool:
    exponent_bits, length = _exponent_bits(lines.dtype), lines.shape[2]
    for turned in (False, True):
        own, chosen = (array.swapaxes(0, 1) if turned else array for array in (lines, masks))
        if _are_side_by_side(own, chosen) and own.shape[1] >= codegen.lines_at_once(own.itemsize, side_by_side=True):
            return codegen.choose(own, chosen, kept, exponent_bits, side_by_side=True)
        if _are_in_a_row(own, chosen):
            if all(array.strides[0] == own.shape[1] * array.strides[1] for array in (own, chosen)):
                own, chosen = own.reshape(1, -1, length), chosen.reshape(1, -1, length)
            if own.shape[1] >= codegen.lines_at_once(own.itemsize, side_by_side=False):
                return codegen.choose(own, chosen, kept, exponent_bits, side_by_side=False)
    all_finite = True
    for own, chosen in _parts(lines, masks):
        all_finite &= _choose_in_copy(own, chosen, kept, exponent_bits)
    return all_finite


def _choose_in_copy(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int, exponent_bits: int) -> bool:
    if abs(lines.strides[0]) < abs(lines.strides[1]):
        lines, masks = lines.swapaxes(0, 1), masks.swapaxes(0, 1)
    down, across, length = lines.shape
    count = max(down * across, codegen.lines_at_once(lines.itemsize, side_by_side=True))
    # NumPy copies what it writes in long rows fastest.
    copy = np.empty((length, count), lines.dtype)
    copied_masks = np.empty(copy.shape, np.bool_)
    part = copy[:, : down * across].reshape(length, down, across)
    part[...] = lines.transpose(2, 0, 1)
    copy[:, down * across :] = copy[:, :1]
    all_finite = codegen.choose(copy.T[np.newaxis], copied_masks.T[np.newaxis], kept, exponent_bits, side_by_side=True)
    masks[...] = copied_masks[:, : down * across].reshape(length, down, across).transpose(1, 2, 0)
    return all_finite


def _are_side_by_side(lines: NDArray[Any], masks: NDArray[np.bool_]) -> bool:
    return all(array.strides[1] == array.itemsize for array in (lines, masks))


def _are_in_a_row(lines: NDArray[Any], masks: NDArray[np.bool_]) -> bool:
    return all(array.strides[1:] == (array.shape[2] * array.itemsize, array.itemsize) for array in (lines, masks))


def _parts(lines: NDArray[Any], masks: NDArray[np.bool_]) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
    down, across, length = lines.shape
    step_across = min(across, max(1, _COPIED // length))
    step_down = max(1, _COPIED // (length * step_across))
    for p in range(0, down, step_down):
        for q in range(0, across, step_across):
            part = slice(p, p + step_down), slice(q, q + step_across)
            yield lines[part], masks[part]


def _select(lines: NDArray[Any], masks: NDArray[np.bool_], kept: int) -> bool:
    magnitudes = np.abs(lines)
    length = lines.shape[2]
    if not magnitudes.max() < np.inf:
        return False
    least = np.partition(magnitudes, length - kept, axis=2)[..., length - kept, np.newaxis]
    masks[...] = magnitudes > least
    room = kept - masks.sum(2, keepdims=True)
    ties = magnitudes == least
    masks |= ties & (ties.cumsum(2) <= room)
    return True
