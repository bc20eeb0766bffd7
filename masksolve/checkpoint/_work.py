"""What a worker does with one unit: hash it, prune it, verify it. It knows paths, never who called it."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from masksolve._certificate import certify_tiles, scale_shift
from masksolve._check import BadGroup, find_bad_group
from masksolve._pattern import Pattern
from masksolve._solve import solve_block, solve_matrix
from masksolve._tiles import convolution_matrices, regions, tile_grids
from masksolve.checkpoint._file import CheckpointError
from masksolve.checkpoint._masks import pack, packed_like, unpack
from masksolve.checkpoint._units import (
    Piece,
    Unit,
    as_bytes,
    pieces_of,
    put,
    read_bytes,
    read_piece,
    read_weights,
    shape_of,
    sync,
    weights_place,
    write_piece,
)

# Gaps of tiles are counted in these classes: 0, up to 1e-4, ..., more than 0.1.
GAP_CLASSES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, float("inf"))
_SMALLEST_GAP = 1e-16
_WORST_TILES = 4


@dataclass(frozen=True)
class Job:
    """What is done with every unit. Paths are absolute and mean the same file to every worker.

    `source` and `output` are folders, `output` is None where only masks are written; `masks` is the file of masks to
    write; `given` is the file of masks to apply, instead of solving by `method`.
    """

    source: Path
    pattern: Pattern
    method: str
    output: Path | None
    masks: Path | None
    given: Path | None = None


@dataclass(frozen=True)
class TileRecord:
    """A tile of a tensor: its first row and column, the matrix that it is in, and what it keeps.

    `matrix` is a position of a convolution's kernel, an index into a stack, or (). `mask` has a line for each row, "1"
    where the entry is kept.
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
        """What sorts tiles from the best to the worst: the gap, then the share of importance that is lost."""
        return self.gap, 1 - self.kept / self.importance if self.importance > 0 else 0.0


@dataclass(frozen=True)
class BandRecord:
    """What pruning did to a band, or to all bands of a tensor. `gaps` counts tiles by `GAP_CLASSES`."""

    importance: float
    kept: float
    upper_bound: float
    optimal: bool
    gaps: tuple[int, ...]
    worst: tuple[TileRecord, ...]
    solve_seconds: float
    certify_seconds: float

    @property
    def kept_importance(self) -> float:
        """Kept importance as a share of all importance; 1.0 for weights that are all zero."""
        return self.kept / self.importance if self.importance > 0 else 1.0

    @property
    def gap(self) -> float:
        """As in `masksolve.Certificate`."""
        is_closed = self.optimal or self.upper_bound == 0
        return 0.0 if is_closed else (self.upper_bound - self.kept) / self.upper_bound


@dataclass(frozen=True)
class UnitRecord:
    """A unit that is done: the hashes of what was written of it, and what pruning did if it is a band."""

    output: str
    masks: str
    band: BandRecord | None = None


def try_method(job: Job) -> None:
    """Raise what the method raises if it cannot solve a tile of this pattern; the tile compiles its code, too."""
    n, m = job.pattern.n, job.pattern.m
    solve_block(np.zeros((m, m)), n, m, method=job.method)


def fingerprint_unit(job: Job, unit: Unit) -> str:
    """The hash of a unit of the input, whose weights have to be finite.

    Raises
    ------
    CheckpointError
        For a truncated file, and NaN or infinite weights.
    """
    hasher = xxhash.xxh3_128()
    if unit.tensor is None:
        hasher.update(read_bytes(job.source, unit))
        return hasher.hexdigest()
    for piece in pieces_of(unit, job.pattern):
        weights = read_weights(job.source, unit, piece)
        check_finite(unit, piece, weights)
        hasher.update(as_bytes(weights))
    return hasher.hexdigest()


def check_finite(unit: Unit, piece: Piece, weights: NDArray[Any]) -> None:
    """Refuse NaN and infinite weights of a piece, naming the tensor and the first of them."""
    if _is_finite(weights):
        return
    assert unit.tensor is not None
    bad = tuple(int(index) for index in np.argwhere(~np.isfinite(weights))[0])
    lead, row = unit.tensor.matrix_of(piece.rows.start + bad[0])
    where = ", ".join(map(str, (*lead, row, piece.columns.start + bad[1], *bad[2:])))
    raise CheckpointError(
        f"tensor {unit.tensor.name!r}: weights[{where}] is {weights[bad]}; NaN and infinities have no "
        "importance; replace them first, or name the tensor in `exclude`"
    )


def prune_unit(job: Job, unit: Unit, fingerprint: str) -> UnitRecord:
    """Write a unit of the output, and wait until it is on the disk.

    Raises
    ------
    CheckpointError
        If the input is not what it was when `fingerprint` was taken, or a given mask breaks the pattern.
    OSError
        If it cannot be written.
    """
    read, written, stored = xxhash.xxh3_128(), xxhash.xxh3_128(), xxhash.xxh3_128()
    bands = []
    with contextlib.ExitStack() as stack:
        output = None if job.output is None else stack.enter_context(_open_to_write(job.output / unit.file))
        masks = None if job.masks is None else stack.enter_context(_open_to_write(job.masks))
        if unit.tensor is None:
            content = read_bytes(job.source, unit)
            read.update(content)
            if output is not None:
                put(output, unit.start, content)
                written.update(content)
        else:
            for piece in pieces_of(unit, job.pattern):
                weights = read_weights(job.source, unit, piece)
                read.update(as_bytes(weights))
                mask, band = mask_of(job, unit, piece, weights)
                bands.append(band)
                if output is not None:
                    _zero_pruned(weights, mask)
                    write_piece(output, weights_place(unit.tensor), piece, weights)
                    written.update(as_bytes(weights))
                if masks is not None and unit.masks is not None:
                    packed = pack(mask)
                    write_piece(masks, unit.masks, piece, packed)
                    stored.update(as_bytes(packed))
        if read.hexdigest() != fingerprint:
            raise CheckpointError(f"the input changed while it was read: {unit.describe()}")
        if output is not None:
            sync(output)
        if masks is not None and unit.tensor is not None:
            sync(masks)
    return UnitRecord(written.hexdigest(), stored.hexdigest(), merge_bands(bands) if bands else None)


def verify_unit(job: Job, unit: Unit, record: UnitRecord) -> bool:
    """Whether the output holds what the record says was written."""
    try:
        return _hashes_of_output(job, unit) == (record.output, record.masks)
    except CheckpointError:  # it ends too soon
        return False


def _hashes_of_output(job: Job, unit: Unit) -> tuple[str, str]:
    written, stored = xxhash.xxh3_128(), xxhash.xxh3_128()
    if unit.tensor is None:
        if job.output is not None:
            written.update(read_bytes(job.output, unit))
    else:
        for piece in pieces_of(unit, job.pattern):
            if job.output is not None:
                written.update(as_bytes(read_weights(job.output, unit, piece)))
            if job.masks is not None and unit.masks is not None:
                stored.update(as_bytes(_read_packed(job.masks, unit, piece)))
    return written.hexdigest(), stored.hexdigest()


def merge_bands(bands: list[BandRecord]) -> BandRecord:
    """The record of several bands taken together."""
    worst = sorted((tile for band in bands for tile in band.worst), key=lambda tile: tile.badness, reverse=True)
    return BandRecord(
        importance=sum(band.importance for band in bands),
        kept=sum(band.kept for band in bands),
        upper_bound=sum(band.upper_bound for band in bands),
        optimal=all(band.optimal for band in bands),
        gaps=tuple(map(sum, zip(*(band.gaps for band in bands), strict=True))),
        worst=tuple(worst[:_WORST_TILES]),
        solve_seconds=sum(band.solve_seconds for band in bands),
        certify_seconds=sum(band.certify_seconds for band in bands),
    )


def _is_finite(weights: NDArray[Any]) -> bool:
    # By the bits of the exponent, all of which are set otherwise: NumPy looks at bfloat16 one by one.
    bits = weights.view(f"u{weights.dtype.itemsize}")
    exponent = np.array(np.inf, weights.dtype).view(bits.dtype)
    return not bool(((bits & exponent) == exponent).any())


def _open_to_write(path: Path) -> Any:
    return path.open("r+b", buffering=0)


def mask_of(job: Job, unit: Unit, piece: Piece, weights: NDArray[Any]) -> tuple[NDArray[np.bool_], BandRecord]:
    """The mask of a piece, shaped like its weights, and what it keeps."""
    n, m = job.pattern.n, job.pattern.m
    start = time.perf_counter()
    matrices = convolution_matrices(narrow_as_float32(weights))
    potentials = None
    if job.given is None:
        if job.method == "exact":
            mask, potentials = solve_matrix(matrices, n, m, threads=1, return_potentials=True)
        else:
            mask = solve_matrix(matrices, n, m, method=job.method, threads=1)
        shaped = np.moveaxis(mask, (-2, -1), (0, 1))
    else:
        shaped = unpack(_read_packed(job.given, unit, piece), weights.shape)
        mask = convolution_matrices(shaped)
        bad = find_bad_group(mask, job.pattern, False, "both")
        if bad is not None:
            assert unit.tensor is not None
            complaint = in_tensor(bad, unit, piece).describe(job.pattern, False)
            raise CheckpointError(f"the masks of tensor {unit.tensor.name!r} are not {job.pattern}: {complaint}")
    return shaped, _certified(matrices, mask, potentials, job.pattern, unit, piece, start)


def in_tensor(bad: BadGroup, unit: Unit, piece: Piece) -> BadGroup:
    """A bad group of a piece, as a group of the tensor."""
    assert unit.tensor is not None
    moved = bad.moved(piece.rows.start, piece.columns.start)
    if not unit.tensor.stack:
        return moved
    if moved.along == "rows":
        lead, line = unit.tensor.matrix_of(moved.line)
        return replace(moved, lead=lead, line=line)
    lead, start = unit.tensor.matrix_of(moved.start)
    return replace(moved, lead=lead, start=start, stop=start + moved.stop - moved.start)


def narrow_as_float32(weights: NDArray[Any]) -> NDArray[Any]:
    """Narrow floats as float32, which holds them exactly, once; NumPy would convert bfloat16 one by one, each time."""
    if weights.dtype.name == "bfloat16":
        bits = weights.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return weights.astype(np.float32) if weights.dtype.itemsize == 2 else weights


def _certified(
    matrices: NDArray[Any],
    mask: NDArray[np.bool_],
    potentials: NDArray[np.floating[Any]] | None,
    pattern: Pattern,
    unit: Unit,
    piece: Piece,
    start: float,
) -> BandRecord:
    """Judge the masks of matrices (*kernel, rows, columns) that were solved since `start`, maybe with potentials."""
    assert unit.tensor is not None
    solved = time.perf_counter()
    shift = scale_shift(matrices)
    importance = kept = bound = 0.0
    optimal = True
    gaps = np.zeros(len(GAP_CLASSES), np.int64)
    worst: list[TileRecord] = []
    for kernel in np.ndindex(matrices.shape[:-2]):
        for region in regions(*matrices.shape[-2:], pattern, "both", True):
            (tiles,), (masks,) = tile_grids(matrices[kernel], region), tile_grids(mask[kernel], region)
            is_whole = region.tile_shape == (pattern.m, pattern.m)
            start_from = None if potentials is None or not is_whole else potentials[kernel]
            found = certify_tiles(tiles, masks, region.margins, shift, threads=1, potentials=start_from)
            optimal &= bool(found.optimal.all())
            with np.errstate(all="ignore"):
                importance += float(found.importance.sum())
                kept += float(found.kept.sum())
                bound += float(found.upper_bound.sum())
                lost = np.nan_to_num(1 - found.kept / found.importance)
                gap = np.nan_to_num(1 - found.kept / found.upper_bound)
            # What is not proven optimal is never counted with what is.
            gap = np.where(found.optimal, 0.0, np.maximum(gap, _SMALLEST_GAP))
            gaps += np.bincount(np.searchsorted(GAP_CLASSES, gap.ravel()), minlength=len(gaps))
            for p, q in _largest(gap if gap.any() else lost):
                with np.errstate(over="ignore"):
                    scaled = np.ldexp((found.importance[p, q], found.kept[p, q]), shift)
                lead, row = unit.tensor.matrix_of(piece.rows.start + region.rows.start + p * region.tile_shape[0])
                worst.append(
                    TileRecord(
                        (*lead, *map(int, kernel)),
                        int(row),
                        int(piece.columns.start + region.columns.start + q * region.tile_shape[1]),
                        tuple("".join(map(str, line)) for line in masks[p, q].astype(int)),
                        float(scaled[0]),
                        float(scaled[1]),
                        float(gap[p, q]),
                    )
                )
    worst.sort(key=lambda tile: tile.badness, reverse=True)
    with np.errstate(over="ignore"):
        importance, kept, bound = (float(np.ldexp(total, shift)) for total in (importance, kept, bound))
    return BandRecord(
        importance,
        kept,
        bound,
        optimal,
        tuple(map(int, gaps)),
        tuple(worst[:_WORST_TILES]),
        solved - start,
        time.perf_counter() - solved,
    )


def _largest(values: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Where in a grid of tiles the largest few values are."""
    count = min(_WORST_TILES, values.size)
    where = np.argpartition(values, values.size - count, axis=None)[-count:]
    return [divmod(int(index), values.shape[1]) for index in where]


def _zero_pruned(weights: NDArray[Any], mask: NDArray[np.bool_]) -> None:
    """Make what the mask does not keep +0.0, in place."""
    bits = weights.view(f"u{weights.dtype.itemsize}")
    np.multiply(bits, mask, out=bits)


def _read_packed(path: Path, unit: Unit, piece: Piece) -> NDArray[np.uint8]:
    assert unit.masks is not None
    packed = packed_like(shape_of(unit, piece))
    read_piece(path, unit.masks, piece, packed)
    return packed
