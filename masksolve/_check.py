"""Is a mask valid: no group of M with more than N ones, or exactly N everywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._errors import InvalidMaskError
from masksolve._inputs import as_mask, check_direction, check_flag
from masksolve._pattern import Pattern
from masksolve._tiles import Direction


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
    check_flag(saturated, "saturated")
    bad = find_bad_group(as_mask(mask), pattern, saturated, check_direction(direction))
    if bad is not None:
        raise InvalidMaskError(bad.describe(pattern, saturated))


def is_valid_mask(mask: ArrayLike, n: int, m: int, *, saturated: bool = False, direction: str = "both") -> bool:
    """Return whether `check_mask` accepts the mask; the same parameters.

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


@dataclass(frozen=True)
class BadGroup:
    """A group that breaks the constraint: entries start to stop of a line of the matrix at index `lead` of a stack."""

    lead: tuple[int, ...]
    along: str
    line: int
    start: int
    stop: int
    kept: int

    def moved(self, rows: int, columns: int) -> BadGroup:
        """Return the same group in the matrix of which this one is the part that begins at (rows, columns)."""
        line, entries = (rows, columns) if self.along == "rows" else (columns, rows)
        return replace(self, line=self.line + line, start=self.start + entries, stop=self.stop + entries)

    def describe(self, pattern: Pattern, saturated: bool) -> str:
        """Say what is wrong, and where."""
        group = f"{self.start}:{self.stop}"
        at = f"{self.line}, {group}" if self.along == "rows" else f"{group}, {self.line}"
        where = ", ".join([*map(str, self.lead), at])
        length = self.stop - self.start
        allowed = (
            f"asks for exactly {pattern.n}" if saturated and length == pattern.m else f"allows at most {pattern.n}"
        )
        return f"mask[{where}] keeps {self.kept} of {length} entries; {pattern} along {self.along} {allowed}"


def find_bad_group(mask: NDArray[np.bool_], pattern: Pattern, saturated: bool, direction: Direction) -> BadGroup | None:
    """Return the first group of a mask (..., R, C) that breaks the constraint: first along rows, then along columns."""
    for along, axis in (("rows", 1), ("columns", 0)):
        if direction in ("both", along):
            for lead in np.ndindex(mask.shape[:-2]):
                found = _find_along(mask[lead], axis, pattern, saturated)
                if found is not None:
                    return BadGroup(lead, along, *found)
    return None


def _find_along(
    matrix: NDArray[np.bool_], axis: int, pattern: Pattern, saturated: bool
) -> tuple[int, int, int, int] | None:
    """Return line, start, stop and kept entries of the first bad group along an axis."""
    n, m = pattern.n, pattern.m
    kept = _group_sums(matrix, axis, m)
    length = matrix.shape[axis]
    bad = kept > n
    if saturated:
        whole = np.arange(kept.shape[axis]) < length // m
        bad |= (kept < n) & (whole if axis == 1 else whole[:, np.newaxis])
    if not bad.any():
        return None
    line, group = (int(i) for i in np.argwhere(bad if axis == 1 else bad.T)[0])
    count = kept[line, group] if axis == 1 else kept[group, line]
    return line, group * m, min((group + 1) * m, length), int(count)


def _group_sums(matrix: NDArray[np.bool_], axis: int, m: int) -> NDArray[np.unsignedinteger[Any]]:
    """Return how many entries of every group of m along an axis are True."""
    shape = list(matrix.shape)
    shape[axis] = -(-shape[axis] // m)
    # Adding whole slices is many times faster than reducing along short groups.
    sums = np.zeros(shape, np.min_scalar_type(m))
    for offset in range(min(m, matrix.shape[axis])):
        entries = matrix[:, offset::m] if axis == 1 else matrix[offset::m]
        part = sums[:, : entries.shape[1]] if axis == 1 else sums[: len(entries)]
        part += entries
    return sums
