"""A safetensors file: what its header says about its tensors.

The safetensors library checks the file: offsets that overlap, leave holes or end beyond it, a header over 100 MB.
Tensors are read and written here, because the library gives NumPy no bfloat16 and no place in the file to write to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from masksolve._pattern import Pattern
from masksolve._tiles import Direction

WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or what was asked cannot be done with it; the message says why, and what to do."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it: safetensors dtype, shape, and which bytes of the file are its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PrunedAs:
    """The pattern and direction that a tensor is pruned to, and how its axes are read.

    Attributes
    ----------
    stack : bool
        Whether as a stack of matrices (..., rows, columns) rather than as (out, in, *kernel).
    pattern : Pattern
    direction : {"both", "rows", "columns"}
        That of its groups as it is stored: where out and in are exchanged, that of the matrices exchanged too.
    """

    stack: bool
    pattern: Pattern
    direction: Direction


@dataclass(frozen=True)
class ChosenTensor(TensorInfo):
    """A tensor that is pruned, and to what."""

    to: PrunedAs

    @classmethod
    def of(cls, tensor: TensorInfo, to: PrunedAs) -> ChosenTensor:
        """Return the tensor with what it is pruned to."""
        return cls(tensor.name, tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes, to)

    @property
    def stack(self) -> bool:
        """Whether it is pruned as a stack of matrices."""
        return self.to.stack

    @property
    def pattern(self) -> Pattern:
        """The pattern that it is pruned to."""
        return self.to.pattern

    @property
    def direction(self) -> Direction:
        """The direction of its groups, as it is stored."""
        return self.to.direction

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """(rows, columns, *kernel): its shape, with the matrices of a stack one below the other."""
        return flat_shape(self.shape, self.stack)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Rows and columns of one of its matrices."""
        return self.shape[-2:] if self.stack else self.shape[:2]

    def matrix_of(self, row: int) -> tuple[tuple[int, ...], int]:
        """Return the index of the matrix in which a row of `flat_shape` is, () outside stacks, and its number there."""
        if not self.stack:
            return (), row
        *lead, own = (int(index) for index in np.unravel_index(row, self.shape[:-1]))
        return tuple(lead), own


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its tensors, in their order there, and its metadata."""

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]


def flat_shape(shape: Sequence[int], stack: bool) -> tuple[int, ...]:
    """Return (rows, columns, *kernel) of a tensor, the matrices of a stack (..., rows, columns) one below the other."""
    return (math.prod(shape[:-1]), shape[-1]) if stack else tuple(shape)


def printable(name: str) -> str:
    """Return a name of a tensor or file as a terminal may see it: quoted if anything in it would control one."""
    return name if name.isprintable() else repr(name)


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises
    ------
    CheckpointError
        If the file is missing, unreadable, empty, truncated, not a safetensors file, or names a tensor twice.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            # To open a pipe would wait for whoever writes into it.
            raise CheckpointError(f"{path} is neither a file nor a folder; name a .safetensors file")
        # Opened here first: the library calls every file that it cannot open missing.
        with path.open("rb") as file:
            with safe_open(path, framework="numpy"):
                pass
            text = _read_text(file)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse_header(text, path)


def read_header_text(path: Path) -> bytes:
    """Return the beginning of a safetensors file as it stands there: the length of its header, and the header."""
    with path.open("rb") as file:
        return _read_text(file)


def _read_text(file: BinaryIO) -> bytes:
    length = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))


def parse_header(text: bytes, path: Path) -> Header:
    """Parse the beginning of a safetensors file.

    Raises
    ------
    CheckpointError
        If it is not a JSON object, or names a tensor twice. That its values are right is for the library to say.
    """
    header = parse_json(text[8:], path)
    metadata = header.pop("__metadata__", None) or {}
    tensors = []
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors.append(TensorInfo(name, entry["dtype"], tuple(entry["shape"]), len(text) + start, stop - start))
    return Header(tuple(tensors), metadata)


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object, in which no key may stand twice: readers disagree on which of the two counts.

    Raises
    ------
    CheckpointError
        If it is not a JSON object, or has a key twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise CheckpointError(f"{path} names {key!r} twice; write the file again with each name once")
            result[key] = value
        return result

    try:
        parsed = json.loads(text, object_pairs_hook=pairs)
    except CheckpointError:  # of `pairs`; it is a ValueError too
        raise
    except (ValueError, RecursionError) as error:  # JSON's, that of bytes that are not text, of too long a number
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return parsed
