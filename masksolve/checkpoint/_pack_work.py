"""The work on one unit of a checkpoint that is packed or unpacked. A worker knows paths, never who called it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from masksolve._check import find_bad_group
from masksolve._pattern import Pattern
from masksolve._tiles import convolution_matrices
from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError
from masksolve.checkpoint._masks import pack, packed_like, unpack
from masksolve.checkpoint._packed import PackedUnit, along, axis_of, kept_piece
from masksolve.checkpoint._units import (
    Piece,
    Unit,
    as_bytes,
    fill,
    pieces_of,
    put,
    read_piece,
    read_weights,
    shape_of,
    start_sync,
    sync,
    weights_place,
    write_piece,
)
from masksolve.checkpoint._work import Target, UnitRecord, in_tensor


@dataclass(frozen=True)
class PackJob:
    """The work on every unit: where the input is. Paths are absolute, and mean the same file to every worker."""

    source: Path


def find_obstacle(folder: Path, unit: Unit) -> str | None:
    """Return why the tensor of a band cannot be packed, in words; None if nothing in the band prevents it."""
    assert unit.tensor is not None
    pattern, direction = unit.tensor.pattern, along(unit.tensor)
    for piece in pieces_of(unit):
        weights = read_weights(folder, unit, piece)
        bad = find_bad_group(convolution_matrices(_bits(weights) != 0), pattern, False, direction)
        if bad is not None:
            what = in_tensor(bad, unit, piece).describe(pattern, False)
            is_signed = find_bad_group(convolution_matrices(weights != 0), pattern, False, direction) is None
            return f"not {pattern}: {what}" + (", -0.0 among them; make these 0.0 first" if is_signed else "")
    return None


def read_dense(job: PackJob, unit: Unit) -> str:
    """Return the hash of a unit of a dense checkpoint.

    Raises
    ------
    CheckpointError
        For a truncated file, or a header that has changed since it was read.
    """
    return _hash_dense(job.source, unit)


def read_packed(job: PackJob, unit: Unit) -> str:
    """Return the hash that a unit of a packed checkpoint has when it is unpacked.

    Raises
    ------
    CheckpointError
        For a truncated file, a header that has changed since it was read, and bits that are not N:M.
    """
    return _hash_packed(job.source, unit)


def pack_unit(job: PackJob, unit: Unit, target: Target, fingerprint: str) -> UnitRecord:
    """Write a unit of the packed output, and wait until it is on the disk.

    Raises
    ------
    CheckpointError
        If the input is not what it was when `fingerprint` was taken.
    OSError
        If it cannot be written.
    """
    assert isinstance(unit, PackedUnit)
    assert target.output is not None
    hasher = xxhash.xxh3_128()
    with (target.output / unit.file).open("r+b", buffering=0) as file:
        if unit.instead is not None:
            return _replace(job, unit, file, fingerprint)
        if unit.tensor is None:
            content = _read(job.source / unit.file, unit.start, unit.nbytes)
            hasher.update(content)
            put(file, unit.moved, content)
        else:
            assert unit.masks is not None
            assert unit.values is not None
            for piece in pieces_of(unit):
                weights = read_weights(job.source, unit, piece)
                hasher.update(as_bytes(weights))
                mask, values = split(weights, unit.tensor.pattern, axis_of(unit.tensor))
                if mask is None:
                    raise _changed(unit)
                write_piece(file, unit.masks, piece, pack(mask))
                if values.size:
                    write_piece(file, unit.values, kept_piece(unit.tensor, piece), values)
                # The disk works while the next piece is packed.
                start_sync(file)
        if hasher.hexdigest() != fingerprint:
            raise _changed(unit)
        sync(file)
    return UnitRecord(fingerprint, "")


def unpack_unit(job: PackJob, unit: Unit, target: Target, fingerprint: str) -> UnitRecord:
    """Write a unit of the dense output, and wait until it is on the disk.

    Raises
    ------
    CheckpointError
        If the input is not what it was when `fingerprint` was taken.
    OSError
        If it cannot be written.
    """
    assert isinstance(unit, PackedUnit)
    assert target.output is not None
    hasher = xxhash.xxh3_128()
    with (target.output / unit.file).open("r+b", buffering=0) as file:
        if unit.instead is not None:
            return _replace(job, unit, file, fingerprint)
        if unit.tensor is None:
            content = _read(job.source / unit.file, unit.moved, unit.nbytes)
            hasher.update(content)
            put(file, unit.start, content)
        else:
            for piece, weights in _unpacked(job.source, unit):
                hasher.update(as_bytes(weights))
                write_piece(file, weights_place(unit.tensor), piece, weights)
                start_sync(file)
        if hasher.hexdigest() != fingerprint:
            raise _changed(unit)
        sync(file)
    return UnitRecord(fingerprint, "")


def verify_packed(job: PackJob, unit: Unit, target: Target, record: UnitRecord) -> bool:
    """Return whether the packed output, unpacked, is the input."""
    return _is_output(_hash_packed, unit, target, record)


def verify_dense(job: PackJob, unit: Unit, target: Target, record: UnitRecord) -> bool:
    """Return whether the dense output is what the input was unpacked to."""
    return _is_output(_hash_dense, unit, target, record)


def split(weights: NDArray[Any], pattern: Pattern, axis: int) -> tuple[NDArray[np.bool_] | None, NDArray[Any]]:
    """Return the mask of a piece (rows, columns, *kernel), and the values that it keeps along an axis, as integers.

    Everything but +0.0 is kept, and as many of the first zeros of each group as it has fewer than N others. The mask
    is None where a group has more of them.
    """
    bits = np.moveaxis(_bits(weights), axis, -1)
    mask = np.ascontiguousarray(bits != 0)
    length = mask.shape[-1]
    whole = length // pattern.m * pattern.m
    kept = 0
    for part, size in ((slice(whole), pattern.m), (slice(whole, length), length - whole)):
        if part.stop == (part.start or 0):
            continue
        # The groups of whole rows are a view, others a copy.
        groups = mask[..., part].reshape(-1, size)
        if not _fill(groups, min(pattern.n, size)):
            return None, bits
        mask[..., part] = groups.reshape(*mask.shape[:-1], -1)
        kept += groups.size // size * min(pattern.n, size)
    # Many times faster than to index with booleans.
    values = np.take(bits, np.flatnonzero(mask)).reshape(*bits.shape[:-1], kept // math.prod(bits.shape[:-1]))
    return np.ascontiguousarray(np.moveaxis(mask, -1, axis)), np.ascontiguousarray(np.moveaxis(values, -1, axis))


def join(mask: NDArray[np.bool_], values: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return what `split` split, as integers."""
    keep = np.moveaxis(mask, axis, -1)
    bits = np.zeros(keep.shape, values.dtype)
    bits.reshape(-1)[np.flatnonzero(keep)] = np.moveaxis(values, axis, -1).reshape(-1)
    return np.ascontiguousarray(np.moveaxis(bits, -1, axis))


def _fill(groups: NDArray[np.bool_], kept: int) -> bool:
    """Set the first False entries of each group (groups, length) that has fewer; return whether none has more."""
    counts = np.zeros(len(groups), np.min_scalar_type(groups.shape[1]))
    # Adding whole columns is many times faster than summing along short groups.
    for entry in range(groups.shape[1]):
        counts += groups[:, entry]
    short = np.flatnonzero(counts < kept)
    if len(short):
        some = groups[short]
        missing = kept - counts[short].astype(np.int64)
        some |= ~some & (np.cumsum(~some, axis=1) <= missing[:, np.newaxis])
        groups[short] = some
    return not (counts > kept).any()


def _bits(weights: NDArray[Any]) -> NDArray[Any]:
    return weights.view(f"u{weights.dtype.itemsize}")


def _unpacked(folder: Path, unit: PackedUnit) -> Iterator[tuple[Piece, NDArray[Any]]]:
    """Yield the pieces of a band, unpacked.

    Raises
    ------
    CheckpointError
        If a group has more or fewer bits than values, or a row more bits than columns.
    """
    tensor = unit.tensor
    assert tensor is not None
    assert unit.masks is not None
    assert unit.values is not None
    dtype = WEIGHT_DTYPES[tensor.dtype]
    for piece in pieces_of(unit):
        shape = shape_of(unit, piece)
        packed = packed_like(shape)
        read_piece(folder / unit.file, unit.masks, piece, packed)
        mask = unpack(packed, shape)
        kept = kept_piece(tensor, piece)
        rows, columns = kept.rows.stop - kept.rows.start, kept.columns.stop - kept.columns.start
        values = np.empty((rows, columns, *shape[2:]), f"u{dtype.itemsize}")
        _check_bits(unit, piece, packed, mask)
        if values.size:
            read_piece(folder / unit.file, unit.values, kept, values)
        yield piece, join(mask, values, axis_of(tensor)).view(dtype)


def _check_bits(unit: PackedUnit, piece: Piece, packed: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
    tensor = unit.tensor
    assert tensor is not None
    pattern, axis = tensor.pattern, axis_of(tensor)
    bad = find_bad_group(convolution_matrices(mask), pattern, True, along(tensor))
    rest = mask.shape[axis] % pattern.m
    kept = min(rest, pattern.n)
    if bad is not None:
        what = in_tensor(bad, unit, piece).describe(pattern, True)
    elif rest and (np.count_nonzero(np.moveaxis(mask, axis, -1)[..., -rest:], axis=-1) != kept).any():
        what = f"a partial group of {rest} does not keep {kept}, in {unit.describe()}"
    elif not np.array_equal(pack(mask), packed):
        what = f"bits beyond the last column, in {unit.describe()}"
    else:
        return
    raise CheckpointError(f"the bitmask of tensor {tensor.name!r} is corrupt: {what}; get the file again")


def _read(path: Path, start: int, nbytes: int) -> memoryview:
    content = memoryview(bytearray(nbytes))
    with path.open("rb", buffering=0) as file:
        fill(file, path, start, content)
    return content


def _hash_dense(folder: Path, unit: Unit) -> str:
    assert isinstance(unit, PackedUnit)
    hasher = xxhash.xxh3_128()
    if unit.tensor is None:
        hasher.update(_read(folder / unit.file, unit.start, unit.nbytes))
        return _checked(unit, hasher.hexdigest())
    for piece in pieces_of(unit):
        hasher.update(as_bytes(read_weights(folder, unit, piece)))
    return hasher.hexdigest()


def _hash_packed(folder: Path, unit: Unit) -> str:
    assert isinstance(unit, PackedUnit)
    hasher = xxhash.xxh3_128()
    if unit.tensor is None:
        hasher.update(_read(folder / unit.file, unit.moved, unit.nbytes))
        return _checked(unit, hasher.hexdigest())
    for _, weights in _unpacked(folder, unit):
        hasher.update(as_bytes(weights))
    return hasher.hexdigest()


def _checked(unit: PackedUnit, digest: str) -> str:
    if unit.digest is not None and unit.digest != digest:
        raise _changed(unit)
    return digest


def _replace(job: PackJob, unit: PackedUnit, file: Any, fingerprint: str) -> UnitRecord:
    """Write what the output has in place of the beginning of a file."""
    assert unit.instead is not None
    content = _read(job.source / unit.file, 0, unit.nbytes)
    if xxhash.xxh3_128_hexdigest(content) != fingerprint:
        raise _changed(unit)
    put(file, 0, memoryview(unit.instead))
    sync(file)
    return UnitRecord(xxhash.xxh3_128_hexdigest(unit.instead), "")


def _is_output(hash_of: Callable[[Path, Unit], str], unit: Unit, target: Target, record: UnitRecord) -> bool:
    assert isinstance(unit, PackedUnit)
    assert target.output is not None
    try:
        if unit.instead is not None:
            found = xxhash.xxh3_128_hexdigest(_read(target.output / unit.file, 0, len(unit.instead)))
        else:
            found = hash_of(target.output, unit)
    except CheckpointError:  # it ends too soon, or its bits are not those that were written
        return False
    return found == record.output


def _changed(unit: Unit) -> CheckpointError:
    return CheckpointError(f"the input changed while it was read: {unit.describe()}")
