"""Masks apart from their weights: a safetensors file with a bit for every weight, and what it says of them.

A tensor (out, in, *kernel) is stored as U8 (out, bytes), each of its rows from a whole byte on, the first weight in
the lowest bit, so that workers can write their bands side by side. The matrices of a stack lie one below the other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from masksolve._inputs import check_direction
from masksolve._pattern import Pattern
from masksolve.checkpoint._file import (
    CheckpointError,
    ChosenTensor,
    PrunedAs,
    flat_shape,
    parse_json,
    read_header,
)
from masksolve.checkpoint._units import Place, Unit

_FORMAT = "masksolve masks, 1"
_BYTES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class MaskFile:
    """The masks in a file: what they prune `to`, the shapes and hashes of the weights, and where the masks lie."""

    to: dict[str, PrunedAs]
    shapes: dict[str, tuple[int, ...]]
    hashes: dict[str, str]
    places: dict[str, Place]


def hashes_of(units: Sequence[Unit], fingerprints: Sequence[str]) -> dict[str, str]:
    """Return the hash of each tensor's weights, which is that of the hashes of its bands."""
    hashers: dict[str, Any] = {}
    for unit, fingerprint in zip(units, fingerprints, strict=True):
        if unit.tensor is not None:
            hashers.setdefault(unit.tensor.name, xxhash.xxh3_128()).update(bytes.fromhex(fingerprint))
    return {name: hasher.hexdigest() for name, hasher in hashers.items()}


def masks_header(tensors: Sequence[ChosenTensor], hashes: Mapping[str, str]) -> bytes:
    """Return the header of the file of the masks of tensors, as it stands at the file's beginning."""
    described = {
        tensor.name: {
            "shape": tensor.shape,
            "stack": tensor.stack,
            "pattern": str(tensor.pattern),
            "direction": tensor.direction,
            "hash": hashes[tensor.name],
        }
        for tensor in tensors
    }
    header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "weights": json.dumps(described)}}
    position = 0
    for tensor in tensors:
        rows, row = tensor.flat_shape[0], row_bytes(tensor.flat_shape)
        offsets = [position, position + rows * row]
        header[tensor.name] = {"dtype": "U8", "shape": [rows, row], "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def place_masks(units: Sequence[Unit], places: Mapping[str, Place]) -> list[Unit]:
    """Return the units, each band with the place of its tensor's masks."""
    return [unit if unit.tensor is None else replace(unit, masks=places[unit.tensor.name]) for unit in units]


def places_in(tensors: Sequence[ChosenTensor], header: bytes) -> dict[str, Place]:
    """Return where the masks of tensors lie behind such a header."""
    places = {}
    position = len(header)
    for tensor in tensors:
        places[tensor.name] = bits_place(position, tensor.flat_shape)
        position += tensor.flat_shape[0] * row_bytes(tensor.flat_shape)
    return places


def read_mask_file(path: Path) -> MaskFile:
    """Read what a file of masks says of them.

    Raises
    ------
    CheckpointError
        If it is not such a file.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} holds no masks; name a file that a prune has written as `masks`")
    try:
        weights = parse_json(metadata["weights"].encode(), path)
        shapes = {tensor.name: tuple(map(index, weights[tensor.name]["shape"])) for tensor in header.tensors}
        to = {tensor.name: _pruned_as(weights[tensor.name]) for tensor in header.tensors}
        hashes = {tensor.name: weights[tensor.name]["hash"] for tensor in header.tensors}
        flat = {name: flat_shape(shape, to[name].stack) for name, shape in shapes.items()}
        fits = all(
            tensor.dtype == "U8" and tensor.shape == (flat[tensor.name][0], row_bytes(flat[tensor.name]))
            for tensor in header.tensors
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{path} holds masks, but says {error!r} of them; write it again") from None
    if not header.tensors:
        raise CheckpointError(f"{path} holds no mask of any tensor; write it again")
    if not fits:
        raise CheckpointError(f"{path} holds masks whose shapes contradict its metadata; write it again")
    places = {tensor.name: bits_place(tensor.offset, flat[tensor.name]) for tensor in header.tensors}
    return MaskFile(to, shapes, hashes, places)


def read_masks(path: str | os.PathLike[str]) -> dict[str, NDArray[np.bool_]]:
    """Read the masks that `prune_checkpoint` stored, as to train under them.

    Parameters
    ----------
    path : path
        The file of masks.

    Returns
    -------
    dict of str to ndarray of bool
        By the names of the checkpoint, shaped like its weights: True = kept. A byte for every weight.

    Raises
    ------
    CheckpointError
        If it is not such a file.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> import masksolve.checkpoint
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, masks = Path(folder.name, "in.safetensors"), Path(folder.name, "masks.safetensors")
    >>> save_file({"w": np.arange(16.0).reshape(4, 4)}, source)
    >>> _ = masksolve.checkpoint.prune_checkpoint(source, None, "1:4", masks=masks)
    >>> read_masks(masks)["w"].sum(axis=0)
    array([1, 1, 1, 1])
    >>> folder.cleanup()
    """
    path = Path(path)
    found = read_mask_file(path)
    masks = {}
    with path.open("rb") as file:
        for name, shape in found.shapes.items():
            flat, place = flat_shape(shape, found.to[name].stack), found.places[name]
            file.seek(place.offset)
            bits = np.frombuffer(file.read(flat[0] * place.row), np.uint8)
            masks[name] = unpack(bits.reshape(flat[0], place.row), flat).reshape(shape)
    return masks


def _pruned_as(entry: Mapping[str, Any]) -> PrunedAs:
    stack = bool(index(entry["stack"]))
    return PrunedAs(stack, Pattern.parse(entry["pattern"]), check_direction(entry["direction"]))


def hash_of(path: Path) -> str:
    """Return the hash of a whole file of masks."""
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while part := file.read(_BYTES_AT_ONCE):
            hasher.update(part)
    digest: str = hasher.hexdigest()
    return digest


def row_bytes(shape: Sequence[int]) -> int:
    """Return how many bytes hold the mask of one row of a flat shape, that is, of one entry along its first axis."""
    return -(-math.prod(shape[1:]) // 8)


def pack(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return a mask (rows, columns, *kernel) as bits (rows, bytes)."""
    return np.packbits(mask.reshape(len(mask), -1), axis=1, bitorder="little")


def unpack(packed: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the mask of a shape that `pack` made into bits."""
    bits = np.unpackbits(packed, axis=1, count=math.prod(shape[1:]), bitorder="little")
    return bits.view(np.bool_).reshape(shape)


def packed_like(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return an array for the bits of a mask of a shape."""
    return np.empty((shape[0], row_bytes(shape)), np.uint8)


def bits_place(offset: int, shape: Sequence[int]) -> Place:
    """Return where the mask of a tensor of a flat shape lies that begins at an offset."""
    return Place(offset, row_bytes(shape), math.prod(shape[2:]))
