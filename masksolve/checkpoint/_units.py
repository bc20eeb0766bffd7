"""The units of work: bands of tile rows of the tensors to prune, and chunks of bytes to copy.

Together they cover every byte of a checkpoint once, and they are the same however many workers there are. A band
is read and written in pieces of bounded size, through `read` and `write` rather than a memory map: there a truncated
file or a full disk is an error to handle, where a map kills the process.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError, ChosenTensor
from masksolve.checkpoint._layout import Checkpoint

# A band is what an interrupted run may have to do again; a piece is what is held in memory, mostly in the cache. The
# hashes of tensors, in files of masks and in packed files, are those of the hashes of bands of this size.
_WEIGHTS_A_BAND = 1 << 23
WEIGHTS_A_PIECE = 1 << 20
_BYTES_A_CHUNK = 1 << 24
# Of <fcntl.h>: SYNC_FILE_RANGE_WRITE.
_START_WRITING = 2


@dataclass(frozen=True)
class Piece:
    """The part of a band that is held in memory at once: rows, and columns (entries along the second axis)."""

    rows: slice
    columns: slice


@dataclass(frozen=True)
class Place:
    """The place of a tensor's rows in a file: from `offset` on, `row` bytes each, in which a column takes `bits`."""

    offset: int
    row: int
    bits: int

    def within(self, piece: Piece) -> int:
        """Return where in a row a piece begins, in bytes."""
        start: int = piece.columns.start
        return start * self.bits // 8


@dataclass(frozen=True)
class Unit:
    """Bytes `start` to `stop` of a file: a band of rows of `tensor`, or, where that is None, bytes to copy.

    Of the rows of a band only the columns `part`, if that is not None: those of a very wide tensor are several units.
    `masks` is where the tensor's masks lie in a file of masks, if there is one.
    """

    file: str
    start: int
    stop: int
    tensor: ChosenTensor | None = None
    masks: Place | None = None
    part: slice | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        whole = self.stop - self.start
        if self.tensor is None or self.part is None:
            return whole
        width: int = self.part.stop - self.part.start
        return whole // self.tensor.flat_shape[1] * width

    @property
    def rows(self) -> slice:
        """The rows of the tensor's `flat_shape` that are in it."""
        assert self.tensor is not None
        row = self.tensor.nbytes // self.tensor.flat_shape[0]
        return slice((self.start - self.tensor.offset) // row, (self.stop - self.tensor.offset) // row)

    @property
    def columns(self) -> slice:
        """The columns of the tensor's `flat_shape` that are in it."""
        assert self.tensor is not None
        return slice(0, self.tensor.flat_shape[1]) if self.part is None else self.part

    def describe(self) -> str:
        """Describe it in words, for messages."""
        if self.tensor is None:
            return f"bytes {self.start}:{self.stop} of {self.file}"
        columns = "" if self.part is None else f", columns {self.part.start}:{self.part.stop},"
        return f"rows {self.rows.start}:{self.rows.stop}{columns} of tensor {self.tensor.name!r} in {self.file}"


def units_of(checkpoint: Checkpoint, banded: Sequence[ChosenTensor], apart: Collection[str] = ()) -> list[Unit]:
    """Cut a checkpoint into units, in the order of its files and of their bytes.

    The tensors of the names `apart`, of which no band is made, share no chunk with what is beside them.
    """
    chosen = {tensor.name: tensor for tensor in banded}
    units = []
    for file in checkpoint.files:
        held = [chosen.get(each.name, each) for each in file.tensors if each.name in chosen or each.name in apart]
        tensors = sorted(held, key=lambda each: each.offset)
        position = 0
        for tensor in tensors:
            units += chunks_of(file.name, position, tensor.offset)
            if isinstance(tensor, ChosenTensor):
                units += bands_of(file.name, tensor)
            else:
                units += chunks_of(file.name, tensor.offset, tensor.offset + tensor.nbytes)
            position = tensor.offset + tensor.nbytes
        units += chunks_of(file.name, position, file.size)
    return units


def bands_of(file: str, tensor: ChosenTensor) -> list[Unit]:
    """Cut one tensor into bands, those of a single tile row along their columns too where they are very wide."""
    rows, columns = tensor.flat_shape[:2]
    row = tensor.nbytes // rows
    high = _rows_at_once(tensor, _WEIGHTS_A_BAND)
    wide = _columns_at_once(tensor, _WEIGHTS_A_BAND) if high == tensor.pattern.m else columns
    parts = [slice(at, min(at + wide, columns)) for at in range(0, columns, wide)] if wide < columns else [None]
    # No tile reaches into the next matrix of a stack.
    height = tensor.matrix_shape[0] if tensor.matrix_shape[0] % tensor.pattern.m else rows
    return [
        Unit(file, tensor.offset + at * row, tensor.offset + min(at + high, first + height) * row, tensor, part=part)
        for first in range(0, rows, height)
        for at in range(first, first + height, high)
        for part in parts
    ]


def _rows_at_once(tensor: ChosenTensor, weights: int) -> int:
    """Return how many rows hold about this many weights: whole tile rows, and at least one."""
    m = tensor.pattern.m
    return max(1, weights // (math.prod(tensor.flat_shape[1:]) * m)) * m


def _columns_at_once(tensor: ChosenTensor, weights: int) -> int:
    """Return how many columns of one tile row hold about this many weights."""
    # Masks are stored eight to the byte; each part begins at a whole one.
    m = tensor.pattern.m
    whole = math.lcm(m, 8)
    return max(1, weights // (m * math.prod(tensor.flat_shape[2:]) * whole)) * whole


def chunks_of(file: str, start: int, stop: int) -> list[Unit]:
    """Cut bytes to copy into chunks."""
    return [Unit(file, at, min(at + _BYTES_A_CHUNK, stop)) for at in range(start, stop, _BYTES_A_CHUNK)]


def pieces_of(unit: Unit) -> Iterator[Piece]:
    """Cut a band into pieces: whole rows of it, unless a single tile row is too large to be held."""
    assert unit.tensor is not None
    rows, columns = unit.rows, unit.columns
    high = _rows_at_once(unit.tensor, WEIGHTS_A_PIECE)
    wide = _columns_at_once(unit.tensor, WEIGHTS_A_PIECE)
    if high > unit.tensor.pattern.m:
        wide = columns.stop - columns.start
    for row in range(rows.start, rows.stop, high):
        for column in range(columns.start, columns.stop, wide):
            yield Piece(slice(row, min(row + high, rows.stop)), slice(column, min(column + wide, columns.stop)))


def weights_place(tensor: ChosenTensor) -> Place:
    """Return where a tensor's weights lie."""
    rows, columns = tensor.flat_shape[:2]
    row = tensor.nbytes // rows
    return Place(tensor.offset, row, row // columns * 8)


def shape_of(unit: Unit, piece: Piece) -> tuple[int, ...]:
    """Return the shape (rows, columns, *kernel) of a piece."""
    assert unit.tensor is not None
    return (piece.rows.stop - piece.rows.start, piece.columns.stop - piece.columns.start, *unit.tensor.flat_shape[2:])


def read_weights(folder: Path, unit: Unit, piece: Piece) -> NDArray[Any]:
    """Read the weights (rows, columns, *kernel) of a piece, an array of its own."""
    assert unit.tensor is not None
    weights = np.empty(shape_of(unit, piece), WEIGHT_DTYPES[unit.tensor.dtype])
    read_piece(folder / unit.file, weights_place(unit.tensor), piece, weights)
    return weights


def read_piece(path: Path, place: Place, piece: Piece, array: NDArray[Any]) -> None:
    """Fill an array (rows, ...) with what a file holds of a piece."""
    with path.open("rb", buffering=0) as file:
        for start, part in _runs(place, piece, array):
            fill(file, path, start, part)


def write_piece(file: BinaryIO, place: Place, piece: Piece, array: NDArray[Any]) -> None:
    """Put an array (rows, ...) where it belongs in an unbuffered file."""
    for start, part in _runs(place, piece, array):
        put(file, start, part)


def read_bytes(folder: Path, unit: Unit) -> memoryview:
    """Read the bytes of a unit, which is to be copied."""
    content = memoryview(bytearray(unit.nbytes))
    path = folder / unit.file
    with path.open("rb", buffering=0) as file:
        fill(file, path, unit.start, content)
    return content


def as_bytes(array: NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def _runs(place: Place, piece: Piece, array: NDArray[Any]) -> Iterator[tuple[int, memoryview]]:
    """Yield where in the file runs of consecutive entries of a piece begin, and their bytes."""
    start = place.offset + piece.rows.start * place.row + place.within(piece)
    if array[0].nbytes == place.row:
        yield start, as_bytes(array)
        return
    for index, part in enumerate(array):
        yield start + index * place.row, as_bytes(part)


def fill(file: BinaryIO, path: Path, start: int, buffer: memoryview) -> None:
    """Read bytes from `start` on into a buffer.

    Raises
    ------
    CheckpointError
        If the file ends before: it was whole when its header was read.
    """
    file.seek(start)
    view = buffer
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]  # an unbuffered file has it
        if not count:
            raise CheckpointError(f"{path} is truncated: it ends within bytes {start}:{start + len(buffer)}")
        view = view[count:]


def put(file: BinaryIO, start: int, content: memoryview) -> None:
    """Write bytes from `start` on into an unbuffered file, which may take a part at a time."""
    file.seek(start)
    while len(content):
        content = content[file.write(content) :]


@cache
def _starter() -> Callable[[int, int, int, int], int] | None:
    """Return Linux's sync_file_range, or None where there is none."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def start_sync(file: BinaryIO) -> None:
    """Have the disk begin with what was written, where the system can do that: `sync` then waits for less."""
    start = _starter()
    if start is not None:
        # Whether it could is for `sync` to say.
        start(file.fileno(), 0, 0, _START_WRITING)


def sync(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    os.fsync(file.fileno())
