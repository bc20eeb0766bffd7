"""certify: is a mask optimal, and if not, by how much does it fall short; docs/proof.md has the proof."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from masksolve._check import check_mask
from masksolve._errors import UnusableWeightError
from masksolve._floating_point import IeeeArithmetic
from masksolve._inputs import as_mask, as_weights, check_direction, check_flag, check_values
from masksolve._pattern import Pattern
from masksolve._tiles import Direction, Region, grids, regions, tile_grids

if TYPE_CHECKING:
    from masksolve._judge.grid import Sums

# Above this binary exponent the sums of a tile could leave float64.
_LARGEST_EXPONENT = 960


def relative_gap(kept: Any, upper_bound: Any, optimal: Any) -> Any:
    """Return how far `kept`, a number or an array, is below the upper bound, as a share of it; 0.0 if optimal."""
    with np.errstate(all="ignore"):
        return np.where(np.logical_or(optimal, upper_bound == 0), 0.0, np.subtract(upper_bound, kept) / upper_bound)


@dataclass(frozen=True)
class Certificate:
    """The verdict of `certify`.

    Attributes
    ----------
    kept : float
        Importance that the mask keeps, the sum of abs(weights) under its ones; inf if that is beyond float64.
    upper_bound : float
        No mask that satisfies the constraint keeps more, up to the rounding of a float64 sum.
    gap : float
        (upper_bound - kept) / upper_bound; 0.0 for an optimal mask and for weights that are all zero. Negative only
        where `saturated=True` and the mask leaves lines short of n and keeps more than any saturated mask can.
    optimal : bool
        The mask satisfies the constraint and no other mask that does keeps more. Decided exactly, not within a
        tolerance.
    """

    kept: float
    upper_bound: float
    gap: float
    optimal: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name, for JSON or a table."""
        return asdict(self)


def certify(
    weights: ArrayLike, mask: ArrayLike, n: int, m: int, *, saturated: bool = True, direction: str = "both"
) -> Certificate:
    """Judge a mask, wherever it comes from, against the optimum.

    By linear-programming duality: a mask is optimal if and only if there are potentials of rows and columns such that
    every entry that it keeps is worth at least the potentials of its row and column together, every other at most that,
    and every line with a positive potential is full. Potentials come from solving the weights, and the mask is judged
    by them here, whatever they are; what they do not decide is judged again in integers, in which every comparison is
    exact. The upper bound is what an optimal mask keeps. All of it takes one and a half to three times as long as
    `solve_matrix`.

    Parameters
    ----------
    weights : array_like, shape (..., R, C)
        As for `solve_matrix`; a block (m, m) or a batch (B, m, m) too.
    mask : array_like, same shape
        bool, or numbers that are all 0 or 1; True = kept. It must keep at most n per group.
    n, m : int
        The pattern: n entries are **kept** of every m.
    saturated : bool
        Which constraint: exactly n in every whole group (True), or at most n (False).
    direction : {"both", "rows", "columns"}
        As for `solve_matrix`.

    Returns
    -------
    Certificate
        A mask that leaves a whole group short of n is never optimal under `saturated=True`.

    Raises
    ------
    InvalidMaskError
        If the mask keeps more than n in a group, since no bound holds for such a mask.
    TypeError, ValueError
        As for `solve_matrix`, and for a mask of another shape.

    References
    ----------
    Hubara et al., NeurIPS 2021, arXiv 2102.08124, for the linear program whose dual this is.

    Examples
    --------
    >>> certify([[2, 1], [1, 3]], [[1, 0], [0, 1]], 1, 2)
    Certificate(kept=5.0, upper_bound=5.0, gap=0.0, optimal=True)
    >>> certify([[2, 1], [1, 3]], [[0, 1], [1, 0]], 1, 2)
    Certificate(kept=2.0, upper_bound=5.0, gap=0.6, optimal=False)
    """
    pattern = Pattern(n, m)
    array = as_weights(weights)
    mask_array = as_mask(mask)
    if mask_array.shape != array.shape:
        raise ValueError(f"the mask has shape {mask_array.shape}, the weights {array.shape}; they must be the same")
    checked_direction = check_direction(direction)
    check_flag(saturated, "saturated")

    kept, bounds, optimal = [], [], True
    # Overflow and underflow of sums are seen to here; a caller who makes NumPy raise has other sums in mind.
    with IeeeArithmetic(), np.errstate(all="ignore"):
        shift = scale_shift(array)
        try:
            for found in _certified_sums(array, mask_array, pattern, checked_direction, saturated, shift):
                kept.append(found.kept)
                bounds.append(found.upper_bound)
                optimal &= found.optimal
        except UnusableWeightError:
            # One of these says which weight, or which group of the mask.
            check_values(array)
            check_mask(mask_array, n, m, direction=checked_direction)
            raise
        total, bound = math.fsum(kept), math.fsum(bounds)
        gap = float(relative_gap(total, bound, optimal))
        return Certificate(float(np.ldexp(total, shift)), float(np.ldexp(bound, shift)), gap, optimal)


@dataclass(frozen=True)
class TileCertificates:
    """The verdict on every tile of a region, as arrays (..., P, Q): `Certificate`'s words, and all importance.

    Sums are times 2**-shift.
    """

    importance: NDArray[np.float64]
    kept: NDArray[np.float64]
    upper_bound: NDArray[np.float64]
    optimal: NDArray[np.bool_]

    @property
    def gap(self) -> NDArray[np.float64]:
        """`Certificate.gap` of every tile."""
        gap: NDArray[np.float64] = relative_gap(self.kept, self.upper_bound, self.optimal)
        return gap


def certified_regions(
    weights: NDArray[Any],
    mask: NDArray[np.bool_],
    pattern: Pattern,
    direction: Direction,
    saturated: bool,
    shift: int,
    *,
    threads: int | None = None,
    potentials: NDArray[np.floating[Any]] | None = None,
) -> Iterator[tuple[Region, TileCertificates]]:
    """Judge the masks of a matrix, or of a stack of them, region by region; weights and mask are (..., R, C).

    Sums are times 2**-shift, `scale_shift(weights)`. `potentials` are those of the solve, of `potentials_shape`, if
    known: what they prove is not searched for again.
    """
    # Numba is imported on first use, not with the package.
    from masksolve._judge.grid import Verdicts, judge_grid

    for region in regions(*weights.shape[-2:], pattern, direction, saturated):
        shape = (*weights.shape[:-2], *region.grid_shape)
        found = TileCertificates(np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape, np.bool_))
        known = potentials if region.tile_shape == (pattern.m, pattern.m) else None
        tile_parts, mask_parts = tile_grids(weights, region), tile_grids(mask, region)
        starts = itertools.repeat(None) if known is None else grids(known, inner=1)
        results = zip(*(grids(array, inner=0) for array in vars(found).values()), strict=True)
        for tiles, masks, start, into in zip(tile_parts, mask_parts, starts, results, strict=False):
            judge_grid(tiles, masks, region.margins, shift, threads, start, Verdicts(*into))
        yield region, found


def _certified_sums(
    weights: NDArray[Any],
    mask: NDArray[np.bool_],
    pattern: Pattern,
    direction: Direction,
    saturated: bool,
    shift: int,
) -> Iterator[Sums]:
    """Judge the masks as `certified_regions` does, and sum up."""
    from masksolve._judge.grid import sum_up

    for region in regions(*weights.shape[-2:], pattern, direction, saturated):
        for tiles, masks in zip(tile_grids(weights, region), tile_grids(mask, region), strict=True):
            yield from sum_up(tiles, masks, region.margins, shift)


def scale_shift(array: NDArray[Any]) -> int:
    """Return how many powers of two to take from weights to keep the sums of a tile within float64; mostly 0."""
    if array.dtype.kind != "f" or array.dtype.itemsize < 8:
        return 0
    exponent = math.frexp(max(abs(float(array.max())), abs(float(array.min()))))[1]
    return max(0, exponent - _LARGEST_EXPONENT)
