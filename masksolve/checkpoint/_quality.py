"""Quality of the masks of a band: kept importance, gaps of certificates, and the worst tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masksolve._certificate import certified_regions, relative_gap, scale_shift
from masksolve.checkpoint._units import Piece, Unit

# Gaps of tiles are counted in these classes: 0, up to 1e-4, ..., more than 0.1.
GAP_CLASSES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, float("inf"))
_SMALLEST_GAP = 1e-16
_WORST_TILES = 4


@dataclass(frozen=True)
class TileRecord:
    """One tile of a tensor: where it is, its mask, and what that keeps.

    Attributes
    ----------
    matrix : tuple of int
        The matrix that it is in: a position of a convolution's kernel, an index into a stack, or ().
    row, column : int
        Its first row and column in that matrix.
    mask : tuple of str
        A line for each row, "1" where the entry is kept. One-sided masks have tiles of one row or one column.
    importance, kept : float
        Sum of abs(weights) of all its entries, and of those that are kept.
    gap : float
        As in `masksolve.Certificate`.
    """

    matrix: tuple[int, ...]
    row: int
    column: int
    mask: tuple[str, ...]
    importance: float
    kept: float
    gap: float

    @property
    def badness(self) -> tuple[float, float]:
        """The key that sorts tiles from the best to the worst, by the gap, then by the share of importance lost."""
        return self.gap, 1 - self.kept / self.importance if self.importance > 0 else 0.0


@dataclass(frozen=True)
class Quality:
    """Importance that masks keep, and how far it is from the optimum. `gaps` counts tiles by `GAP_CLASSES`."""

    importance: float
    kept: float
    upper_bound: float
    optimal: bool
    gaps: tuple[int, ...]
    worst: tuple[TileRecord, ...]

    @property
    def kept_importance(self) -> float:
        """Kept importance as a share of all importance; 1.0 for weights that are all zero."""
        return self.kept / self.importance if self.importance > 0 else 1.0

    @property
    def gap(self) -> float:
        """As in `masksolve.Certificate`."""
        return float(relative_gap(self.kept, self.upper_bound, self.optimal))


@dataclass(frozen=True)
class BandRecord(Quality):
    """The record of a band, or of all bands of a tensor, that was pruned."""

    solve_seconds: float
    certify_seconds: float


def judge(
    matrices: NDArray[Any],
    mask: NDArray[np.bool_],
    potentials: NDArray[np.floating[Any]] | None,
    unit: Unit,
    piece: Piece,
) -> Quality:
    """Certify the masks of matrices (*kernel, rows, columns), a piece of a band.

    `potentials` are the column potentials of whole tiles, if the solver returned them.
    """
    assert unit.tensor is not None
    shift = scale_shift(matrices)
    importance = kept = bound = 0.0
    optimal = True
    gaps = np.zeros(len(GAP_CLASSES), np.int64)
    worst: list[TileRecord] = []
    judged = certified_regions(
        matrices, mask, unit.tensor.pattern, unit.tensor.direction, True, shift, threads=1, potentials=potentials
    )
    for region, found in judged:
        optimal &= bool(found.optimal.all())
        importance += float(found.importance.sum())
        kept += float(found.kept.sum())
        bound += float(found.upper_bound.sum())
        share = np.divide(found.kept, found.importance, out=np.ones(found.kept.shape), where=found.importance > 0)
        # A tile that is not proven optimal is never counted with those that are.
        bad = ~found.optimal
        gap = np.zeros(bad.shape)
        gap[bad] = np.maximum(relative_gap(found.kept[bad], found.upper_bound[bad], False), _SMALLEST_GAP)
        classes = np.bincount(np.searchsorted(GAP_CLASSES, gap[bad]), minlength=len(gaps))
        gaps += classes
        gaps[0] += gap.size - classes.sum()
        height, width = region.tile_shape
        # Any tile with a gap is worse than all without one.
        for *kernel, p, q in _largest(np.where(bad, 1 + gap, -share)):
            at = (*kernel, p, q)
            row, column = region.rows.start + p * height, region.columns.start + q * width
            ones = mask[tuple(kernel)][row : row + height, column : column + width]
            with np.errstate(over="ignore"):
                scaled = np.ldexp((found.importance[at], found.kept[at]), shift)
            lead, own_row = unit.tensor.matrix_of(piece.rows.start + row)
            worst.append(
                TileRecord(
                    matrix=(*lead, *kernel),
                    row=own_row,
                    column=piece.columns.start + column,
                    mask=tuple(line.tobytes().decode("ascii") for line in ones + np.uint8(ord("0"))),
                    importance=float(scaled[0]),
                    kept=float(scaled[1]),
                    gap=float(gap[at]),
                )
            )
    with np.errstate(over="ignore"):
        importance, kept, bound = (float(np.ldexp(total, shift)) for total in (importance, kept, bound))
    return Quality(importance, kept, bound, optimal, tuple(map(int, gaps)), _worst(worst))


def merge_bands(bands: list[BandRecord]) -> BandRecord:
    """Return the record of several bands taken together."""
    return BandRecord(
        importance=sum(band.importance for band in bands),
        kept=sum(band.kept for band in bands),
        upper_bound=sum(band.upper_bound for band in bands),
        optimal=all(band.optimal for band in bands),
        gaps=tuple(map(sum, zip(*(band.gaps for band in bands), strict=True))),
        worst=_worst([tile for band in bands for tile in band.worst]),
        solve_seconds=sum(band.solve_seconds for band in bands),
        certify_seconds=sum(band.certify_seconds for band in bands),
    )


def _worst(tiles: list[TileRecord]) -> tuple[TileRecord, ...]:
    return tuple(sorted(tiles, key=lambda tile: tile.badness, reverse=True)[:_WORST_TILES])


def _largest(values: NDArray[np.float64]) -> list[tuple[int, ...]]:
    """Return the indices of the largest few values."""
    count = min(_WORST_TILES, values.size)
    where = np.argpartition(values, values.size - count, axis=None)[-count:]
    return [tuple(map(int, np.unravel_index(index, values.shape))) for index in where]
