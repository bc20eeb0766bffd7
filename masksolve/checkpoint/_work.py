"""The work on one unit: hash it, prune it, verify it. A worker knows paths, never who called it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from masksolve._check import BadGroup, find_bad_group
from masksolve._solve import solve_matrix
from masksolve._tiles import convolution_matrices
from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError, ChosenTensor, TensorInfo
from masksolve.checkpoint._masks import pack, packed_like, unpack
from masksolve.checkpoint._quality import BandRecord, judge, merge_bands
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
    start_sync,
    sync,
    weights_place,
    write_piece,
)


@dataclass(frozen=True)
class SolveMasks:
    """Masks that are solved, by a method of `masksolve.solve_matrix`."""

    method: str


@dataclass(frozen=True)
class StoredMasks:
    """Masks that are read from a file of them; `hash` is that of the whole file."""

    file: Path
    hash: str


@dataclass(frozen=True)
class Job:
    """The work on every unit: where the input is, and where masks come from; None where all is copied.

    Paths are absolute and mean the same file to every worker; `source` is a folder.
    """

    source: Path
    masks: SolveMasks | StoredMasks | None


@dataclass(frozen=True)
class Target:
    """The places where a run writes: the folder of the output, and the file of masks. None for what is not wanted."""

    output: Path | None
    masks: Path | None


@dataclass(frozen=True)
class UnitRecord:
    """A unit that is done: the hashes of what was written of it, and what pruning did if it is a band."""

    output: str
    masks: str
    band: BandRecord | None = None


def try_method(job: Job, chosen: Iterable[ChosenTensor]) -> None:
    """Solve one tile of each kind that there is, which compiles the code for the others too.

    Raises
    ------
    CheckpointError
        If there is no such method, or it cannot solve a tile of this pattern.
    MethodNotInstalledError
        If a library that it needs is missing.
    """
    if not isinstance(job.masks, SolveMasks):
        return
    for pattern, direction in dict.fromkeys((tensor.pattern, tensor.direction) for tensor in chosen):
        n, m = pattern.n, pattern.m
        try:
            solve_matrix(np.zeros((m, m)), n, m, method=job.masks.method, direction=direction, threads=1)
        except ValueError as error:  # zeros are weights like any others: it is the method or the pattern
            raise CheckpointError(str(error)) from error


def fingerprint_unit(job: Job, unit: Unit) -> str:
    """Return the hash of a unit of the input, whose weights have to be finite.

    Raises
    ------
    CheckpointError
        For a truncated file, and NaN or infinite weights.
    """
    hasher = xxhash.xxh3_128()
    if unit.tensor is None:
        hasher.update(read_bytes(job.source, unit))
        return hasher.hexdigest()
    for piece in pieces_of(unit):
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


def prune_unit(job: Job, unit: Unit, target: Target, fingerprint: str) -> UnitRecord:
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
        output = None if target.output is None else stack.enter_context(_open_to_write(target.output / unit.file))
        masks = None if target.masks is None else stack.enter_context(_open_to_write(target.masks))
        if unit.tensor is None:
            content = read_bytes(job.source, unit)
            read.update(content)
            if output is not None:
                put(output, unit.start, content)
                written.update(content)
        else:
            for piece in pieces_of(unit):
                weights = read_weights(job.source, unit, piece)
                read.update(as_bytes(weights))
                if job.masks is not None:
                    mask, band = mask_of(job, unit, piece, weights)
                    bands.append(band)
                    if output is not None:
                        _zero_pruned(weights, mask)
                if output is not None:
                    write_piece(output, weights_place(unit.tensor), piece, weights)
                    # The disk works while the next piece is solved.
                    start_sync(output)
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


def fill_unit(unit: Unit, folder: Path, tensor: TensorInfo, content: NDArray[np.uint8]) -> UnitRecord:
    """Write what is a unit's of the bytes of a whole tensor into the output, and wait until it is on the disk.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    with _open_to_write(folder / unit.file) as output:
        for piece, part in _parts_of(unit, tensor, content):
            if piece is None or unit.tensor is None:
                put(output, unit.start, as_bytes(part))
            else:
                write_piece(output, weights_place(unit.tensor), piece, part)
        sync(output)
    return UnitRecord(hash_of_part(unit, tensor, content), xxhash.xxh3_128().hexdigest())


def hash_of_part(unit: Unit, tensor: TensorInfo, content: NDArray[np.uint8]) -> str:
    """Return the hash of what is a unit's of the bytes of a whole tensor, as `fingerprint_unit` finds it."""
    hasher = xxhash.xxh3_128()
    for _, part in _parts_of(unit, tensor, content):
        hasher.update(as_bytes(part))
    return hasher.hexdigest()


def _parts_of(
    unit: Unit, tensor: TensorInfo, content: NDArray[np.uint8]
) -> Iterator[tuple[Piece | None, NDArray[Any]]]:
    if unit.tensor is None:
        yield None, content[unit.start - tensor.offset : unit.stop - tensor.offset]
        return
    weights = content.view(WEIGHT_DTYPES[tensor.dtype]).reshape(unit.tensor.flat_shape)
    for piece in pieces_of(unit):
        yield piece, np.ascontiguousarray(weights[piece.rows, piece.columns])


def verify_unit(job: Job, unit: Unit, target: Target, record: UnitRecord) -> bool:
    """Return whether the output holds what the record says was written."""
    try:
        return _hashes_of_output(job, unit, target) == (record.output, record.masks)
    except CheckpointError:  # it ends too soon
        return False


def _hashes_of_output(job: Job, unit: Unit, target: Target) -> tuple[str, str]:
    written, stored = xxhash.xxh3_128(), xxhash.xxh3_128()
    if unit.tensor is None:
        if target.output is not None:
            written.update(read_bytes(target.output, unit))
    else:
        for piece in pieces_of(unit):
            if target.output is not None:
                written.update(as_bytes(read_weights(target.output, unit, piece)))
            if target.masks is not None and unit.masks is not None:
                stored.update(as_bytes(_read_packed(target.masks, unit, piece)))
    return written.hexdigest(), stored.hexdigest()


def _is_finite(weights: NDArray[Any]) -> bool:
    # An exponent of ones only is NaN or infinite. NumPy's isfinite takes bfloat16 one by one.
    bits = weights.view(f"u{weights.dtype.itemsize}")
    exponent = np.array(np.inf, weights.dtype).view(bits.dtype)
    return not bool(((bits & exponent) == exponent).any())


def _open_to_write(path: Path) -> Any:
    return path.open("r+b", buffering=0)


def mask_of(job: Job, unit: Unit, piece: Piece, weights: NDArray[Any]) -> tuple[NDArray[np.bool_], BandRecord]:
    """Return the mask of a piece, shaped like its weights, and what it keeps."""
    assert unit.tensor is not None
    pattern, direction = unit.tensor.pattern, unit.tensor.direction
    n, m = pattern.n, pattern.m
    start = time.perf_counter()
    matrices = convolution_matrices(narrow_as_float32(weights))
    potentials = None
    if isinstance(job.masks, StoredMasks):
        shaped = unpack(_read_packed(job.masks.file, unit, piece), weights.shape)
        mask = convolution_matrices(shaped)
        bad = find_bad_group(mask, pattern, False, direction)
        if bad is not None:
            complaint = in_tensor(bad, unit, piece).describe(pattern, False)
            raise CheckpointError(f"the masks of tensor {unit.tensor.name!r} are not {pattern}: {complaint}")
    else:
        assert isinstance(job.masks, SolveMasks)
        if job.masks.method == "exact" and direction == "both":
            # They spare the certificate most of its work.
            mask, potentials = solve_matrix(matrices, n, m, threads=1, return_potentials=True)
        else:
            mask = solve_matrix(matrices, n, m, method=job.masks.method, direction=direction, threads=1)
        shaped = np.moveaxis(mask, (-2, -1), (0, 1))
    solved = time.perf_counter()
    quality = judge(matrices, mask, potentials, unit, piece)
    return shaped, BandRecord(
        **vars(quality), solve_seconds=solved - start, certify_seconds=time.perf_counter() - solved
    )


def in_tensor(bad: BadGroup, unit: Unit, piece: Piece) -> BadGroup:
    """Return a bad group of a piece as a group of the tensor."""
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
    """Return narrow floats as float32, which holds them exactly.

    NumPy would convert bfloat16 one by one, and at every use.
    """
    if weights.dtype.name == "bfloat16":
        bits = weights.view(np.uint16).astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    return weights.astype(np.float32) if weights.dtype.itemsize == 2 else weights


def _zero_pruned(weights: NDArray[Any], mask: NDArray[np.bool_]) -> None:
    """Make what the mask does not keep +0.0, in place."""
    bits = weights.view(f"u{weights.dtype.itemsize}")
    np.multiply(bits, mask, out=bits)


def _read_packed(path: Path, unit: Unit, piece: Piece) -> NDArray[np.uint8]:
    assert unit.masks is not None
    packed = packed_like(shape_of(unit, piece))
    read_piece(path, unit.masks, piece, packed)
    return packed
