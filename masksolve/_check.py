"""Is a mask valid: no group of M with more than N ones, or exactly N everywhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._errors import InvalidMaskError
from masksolve._inputs import as_mask, check_direction
from masksolve._pattern import Pattern


def check_mask(mask: ArrayLike, n: int, m: int, *, saturated: bool = False, direction: str = "both") -> None:
    """Check that a mask is n:m, n kept of every m, along its rows and columns.

    A group is m consecutive entries of a row (or of a column); the last one of a line may be shorter. No group may
    keep more than n. With `saturated=True` every whole group must keep exactly n; a partial group at a ragged edge
    still at most n.

    Parameters
    ----------
    mask : array_like, shape (..., R, C)
        True (or 1) = kept.
    n, m : int
        The pattern: n entries are **kept** of every m.
    saturated : bool
        Ask for exactly n in every whole group.
    direction : {"both", "rows", "columns"}
        Which lines are cut into groups; "both" checks that the mask is transposable.

    Raises
    ------
    InvalidMaskError
        If it is not; the message names the first bad group.

    Examples
    --------
    >>> check_mask([[1, 0], [0, 1]], 1, 2)
    >>> check_mask([[1, 0], [1, 0]], 1, 2)
    Traceback (most recent call last):
    ...
    masksolve._errors.InvalidMaskError: mask[0:2, 0] keeps 2 of 2 entries; 1:2 along columns allows at most 1
    """
    pattern = Pattern(n, m)
    array = as_mask(mask)
    direction = check_direction(direction)
    if direction != "columns":
        _check_lines(array, pattern, saturated, along="rows")
    if direction != "rows":
        _check_lines(array.swapaxes(-1, -2), pattern, saturated, along="columns")


def is_valid_mask(mask: ArrayLike, n: int, m: int, *, saturated: bool = False, direction: str = "both") -> bool:
    """Whether `check_mask` accepts the mask; the same parameters.

    Examples
    --------
    >>> is_valid_mask([[1, 0], [1, 0]], 1, 2)
    False
    """
    try:
        check_mask(mask, n, m, saturated=saturated, direction=direction)
    except InvalidMaskError:
        return False
    return True


def _check_lines(mask: NDArray[np.bool_], pattern: Pattern, saturated: bool, along: str) -> None:
    """Check the groups along the last axis."""
    n, m = pattern.n, pattern.m
    length = mask.shape[-1]
    for lead in np.ndindex(mask.shape[:-2]):
        matrix = mask[lead]
        kept = np.add.reduceat(matrix, np.arange(0, length, m), axis=-1, dtype=np.int32)
        bad = kept > n
        if saturated:
            bad[:, : length // m] |= kept[:, : length // m] < n
        if not bad.any():
            continue
        line, group = (int(i) for i in np.argwhere(bad)[0])
        start, stop = group * m, min((group + 1) * m, length)
        at = f"{line}, {start}:{stop}" if along == "rows" else f"{start}:{stop}, {line}"
        where = ", ".join([*map(str, lead), at])
        allowed = f"asks for exactly {n}" if saturated and stop - start == m else f"allows at most {n}"
        raise InvalidMaskError(
            f"mask[{where}] keeps {kept[line, group]} of {stop - start} entries; {pattern} along {along} {allowed}"
        )
