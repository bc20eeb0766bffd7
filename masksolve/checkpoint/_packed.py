"""The packed form of a shard: of each N:M tensor the kept values, and a bit per weight that says where they are.

A packed tensor NAME.weight of shape (rows, columns), N:M along its rows, is stored as three: NAME.compressed
(rows, kept columns), each row's kept values one behind the other; NAME.bitmask, U8 (rows, bytes), each row from a
whole byte on, the first weight in the lowest bit; NAME.shape, I64 (axes, 1). That is what compressed-tensors called
sparse-24-bitmask where N:M is 2:4; docs/packed.md says what goes beyond it. Each whole group has exactly N bits set,
the partial one at a ragged edge min(N, its length): where fewer entries are not zero, zeros are kept too.

In the metadata, under `PACKED`, is what brings the dense shard back, byte for byte: its header, and what its tensors
were pruned to. In a packed file the shapes come first, then all else in its order, then the bitmasks, so that
everything lies at a multiple of its size if it did before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from masksolve._tiles import Direction
from masksolve.checkpoint._file import (
    WEIGHT_DTYPES,
    CheckpointError,
    ChosenTensor,
    TensorInfo,
    parse_header,
    parse_json,
)
from masksolve.checkpoint._layout import PACKED, CheckpointFile
from masksolve.checkpoint._masks import bits_place, row_bytes
from masksolve.checkpoint._record import pruned_as
from masksolve.checkpoint._units import Piece, Place, Unit, bands_of, chunks_of

_VERSION = 1
# As long as a hash, in whose place it stands until that is known.
_NO_HASH = "0" * 32
# Of the safetensors library.
_LARGEST_HEADER = 100_000_000
_TOTAL = "total_size"


@dataclass(frozen=True)
class PackedUnit(Unit):
    """A unit of a shard, dense and packed; `start` and `stop` are bytes of the dense one.

    Attributes
    ----------
    values : Place or None
        Where the kept values of a band's tensor lie in the packed file; `masks` is where its bits do.
    moved : int
        Where bytes that are copied begin in the packed file.
    instead : bytes or None
        What the output has in place of all bytes up to `stop`: `start` is 0, and these bytes are the input's.
    digest : str or None
        The hash that those bytes of the input had when they were first read.
    """

    values: Place | None = None
    moved: int = 0
    instead: bytes | None = field(default=None, repr=False)
    digest: str | None = None


@dataclass(frozen=True)
class Shard:
    """A shard, dense and packed.

    Attributes
    ----------
    name : str
    text, begin : bytes
        How the dense file begins, with its header, and the packed file, with its header and the shapes.
    sizes : tuple of int
        Those of the dense and of the packed file.
    tensors : tuple of TensorInfo
        Those of the dense file, by their places.
    packed : mapping
        Of the packed ones among them, the tensor, and the places of its values and its bits.
    moved : mapping of str to int
        Of the others, where they begin in the packed file.
    hashes : mapping of str to str
        Those of the packed tensors' dense weights.
    """

    name: str
    text: bytes
    begin: bytes
    sizes: tuple[int, int]
    tensors: tuple[TensorInfo, ...]
    packed: Mapping[str, tuple[ChosenTensor, Place, Place]]
    moved: Mapping[str, int]
    hashes: Mapping[str, str]

    def names(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the name of each tensor, and under which names it is in the packed file."""
        for tensor in self.tensors:
            packed = self.packed.get(tensor.name)
            yield tensor.name, [tensor.name] if packed is None else list(names_of(packed[0]))

    def units(self, *, packing: bool) -> Iterator[Unit]:
        """Yield its units; only the one at its beginning depends on the direction."""
        yield replaced(self.name, *((self.text, self.begin) if packing else (self.begin, self.text)))
        for start, stop, by in self._copied():
            for chunk in chunks_of(self.name, start, stop):
                yield PackedUnit(chunk.file, chunk.start, chunk.stop, moved=chunk.start + by)
        for chosen, values, masks in self.packed.values():
            for band in bands_of(self.name, chosen):
                yield PackedUnit(self.name, band.start, band.stop, chosen, masks, band.part, values)

    def _copied(self) -> Iterator[tuple[int, int, int]]:
        """Yield where bytes that are copied begin and end in the dense file, and how far they move."""
        runs: list[list[int]] = []
        for tensor in self.tensors:
            if tensor.name in self.moved:
                # No packed one lies between tensors that lie one behind the other: these move together.
                if runs and runs[-1][1] == tensor.offset:
                    runs[-1][1] += tensor.nbytes
                else:
                    by = self.moved[tensor.name] - tensor.offset
                    runs.append([tensor.offset, tensor.offset + tensor.nbytes, by])
        yield from ((start, stop, by) for start, stop, by in runs)


def replaced(file: str, before: bytes, after: bytes) -> PackedUnit:
    """Return the unit of the bytes at the beginning of a file of the input that the output has others for."""
    return PackedUnit(file, 0, len(before), instead=after, digest=xxhash.xxh3_128_hexdigest(before))


def axis_of(tensor: ChosenTensor) -> int:
    """Return the axis of the flat shape along which a tensor is packed: its groups are N:M along it."""
    return 0 if tensor.direction == "columns" else 1


def along(tensor: ChosenTensor) -> Direction:
    """Return the direction of the groups of which each has N values in the packed file."""
    return "columns" if axis_of(tensor) == 0 else "rows"


def names_of(tensor: ChosenTensor) -> tuple[str, str, str]:
    """Return the names of the shape, the values and the bits of a packed tensor."""
    base = tensor.name.removesuffix(".weight")
    # Readers of sparse-24-bitmask know no values of columns: another name keeps them from taking these for others.
    return f"{base}.shape", f"{base}.compressed{'_columns' if axis_of(tensor) == 0 else ''}", f"{base}.bitmask"


def kept_piece(tensor: ChosenTensor, piece: Piece) -> Piece:
    """Return which rows and columns of its kept values are those of a piece of a tensor."""
    if axis_of(tensor) == 0:
        return Piece(slice(_kept(tensor, piece.rows.start), _kept(tensor, piece.rows.stop)), piece.columns)
    return Piece(piece.rows, slice(_kept(tensor, piece.columns.start), _kept(tensor, piece.columns.stop)))


def _kept(tensor: ChosenTensor, at: int) -> int:
    """Return how many values are kept before an entry along the packed axis, at which a group begins or all end."""
    pattern = tensor.pattern
    length = tensor.matrix_shape[axis_of(tensor)]
    matrices, rest = divmod(at, length)
    whole = length // pattern.m * pattern.n + min(length % pattern.m, pattern.n)
    return matrices * whole + rest // pattern.m * pattern.n + min(rest % pattern.m, pattern.n)


def _shapes(tensor: ChosenTensor) -> tuple[list[int], list[int], list[int]]:
    """Return the flat shape of its kept values, and the shapes of them and of its bits as they are stored."""
    flat = list(tensor.flat_shape)
    axis = axis_of(tensor)
    flat[axis] = _kept(tensor, flat[axis])
    stored, lead = list(flat), list(tensor.shape[:-1])
    if tensor.stack:
        height = tensor.matrix_shape[0]
        stored = [*lead[:-1], _kept(tensor, height) if axis == 0 else height, flat[1]]
    bits = [*(lead if tensor.stack else lead[:1]), row_bytes(tensor.flat_shape)]
    return flat, stored, bits


def packed_nbytes(tensor: ChosenTensor) -> int:
    """Return the bytes of a packed tensor's values and bits."""
    _, values, bits = _shapes(tensor)
    return math.prod(values) * WEIGHT_DTYPES[tensor.dtype].itemsize + math.prod(bits)


def make_shard(
    name: str, text: bytes, path: Path, chosen: Sequence[ChosenTensor], hashes: Mapping[str, str] | None = None
) -> Shard:
    """Lay out a shard whose dense file begins with `text`, some of its tensors packed.

    Raises
    ------
    CheckpointError
        If the packed file's header would be too large for the safetensors library.
    """
    header = parse_header(text, path)
    # Of tensors without entries several may begin where the next does.
    tensors = tuple(sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)))
    by_name = {tensor.name: tensor for tensor in chosen}
    hashes = {tensor.name: _NO_HASH if hashes is None else hashes[tensor.name] for tensor in chosen}
    entries: dict[str, Any] = {}
    position = 0

    def add(entry: str, dtype: str, shape: Sequence[int], nbytes: int) -> None:
        nonlocal position
        entries[entry] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes

    ordered = [by_name[tensor.name] for tensor in tensors if tensor.name in by_name]
    for one in ordered:
        add(names_of(one)[0], "I64", [len(one.shape), 1], 8 * len(one.shape))
    shapes = b"".join(np.array(one.shape, "<i8").tobytes() for one in ordered)
    for tensor in tensors:
        if tensor.name in by_name:
            one = by_name[tensor.name]
            values = _shapes(one)[1]
            add(names_of(one)[1], one.dtype, values, math.prod(values) * WEIGHT_DTYPES[one.dtype].itemsize)
        else:
            add(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)
    for one in ordered:
        bits = _shapes(one)[2]
        add(names_of(one)[2], "U8", bits, math.prod(bits))
    described = {
        one.name: {
            "stack": one.stack,
            "pattern": str(one.pattern),
            "direction": one.direction,
            "hash": hashes[one.name],
        }
        for one in ordered
    }
    about = {"version": _VERSION, "header": text[8:].decode(), "tensors": described}
    metadata = {**header.metadata, PACKED: json.dumps(about)}
    packed_text = json.dumps({"__metadata__": metadata, **entries}, ensure_ascii=False).encode()
    packed_text += b" " * (-len(packed_text) % 8)
    if len(packed_text) > _LARGEST_HEADER:
        raise CheckpointError(f"{path} has too many tensors to be packed: its header would exceed 100 MB")
    start = 8 + len(packed_text)
    places = {entry: start + int(line["data_offsets"][0]) for entry, line in entries.items()}
    packed = {}
    for one in ordered:
        _, values_name, bits_name = names_of(one)
        packed[one.name] = (
            one,
            _values_place(one, places[values_name]),
            bits_place(places[bits_name], one.flat_shape),
        )
    return Shard(
        name=name,
        text=text,
        begin=len(packed_text).to_bytes(8, "little") + packed_text + shapes,
        sizes=(len(text) + sum(tensor.nbytes for tensor in tensors), start + position),
        tensors=tensors,
        packed=packed,
        moved={tensor.name: places[tensor.name] for tensor in tensors if tensor.name not in by_name},
        hashes=hashes,
    )


def _values_place(tensor: ChosenTensor, offset: int) -> Place:
    itemsize = WEIGHT_DTYPES[tensor.dtype].itemsize
    flat = _shapes(tensor)[0]
    return Place(offset, math.prod(flat[1:]) * itemsize, math.prod(flat[2:]) * itemsize * 8)


def read_shard(folder: Path, file: CheckpointFile) -> Shard | None:
    """Read what a shard says of its packed tensors; None if it has none.

    Raises
    ------
    CheckpointError
        If it is of a version that is not known, or something has changed it since it was packed.
    """
    if PACKED not in file.header.metadata:
        return None
    path = folder / file.name
    try:
        about = parse_json(file.header.metadata[PACKED].encode(), path)
        _check_version(about, path)
        header = about["header"].encode()
        text = len(header).to_bytes(8, "little") + header
        tensors = {tensor.name: tensor for tensor in parse_header(text, path).tensors}
        chosen = [ChosenTensor.of(tensors[name], pruned_as(entry)) for name, entry in about["tensors"].items()]
        hashes = {name: str(entry["hash"]) for name, entry in about["tensors"].items()}
        shard = make_shard(file.name, text, path, chosen, hashes)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} is packed, but what it says of its tensors is corrupt ({error!r}); get the file again"
        ) from None
    with path.open("rb") as opened:
        begin = opened.read(len(shard.begin))
    if begin != shard.begin or file.size != shard.sizes[1] or not _is_whole(shard):
        raise CheckpointError(
            f"{path} is not as it was packed: its header or its shapes were written or changed by something else; "
            "get the file again"
        )
    return shard


def _is_whole(shard: Shard) -> bool:
    """Return whether the tensors of the dense file lie one behind the other, each as large as its shape says."""
    position = len(shard.text)
    for tensor in shard.tensors:
        if tensor.offset != position or tensor.nbytes < 0:
            return False
        position += tensor.nbytes
    return all(
        tensor.nbytes == math.prod(tensor.shape) * WEIGHT_DTYPES[tensor.dtype].itemsize
        for tensor, _, _ in shard.packed.values()
    )


def _check_version(about: Mapping[str, Any], path: Path) -> None:
    if about["version"] != _VERSION:
        raise CheckpointError(
            f"{path} is packed in version {about['version']!r} of the format; this masksolve knows version {_VERSION}: "
            "use the one that packed it, or a newer one"
        )


def pack_index(content: bytes, path: Path, shards: Sequence[Shard], nbytes: int) -> bytes:
    """Return the index of packed shards, whose tensors have this many bytes, given that of the dense ones."""
    index = parse_json(content, path)
    names = dict(pair for shard in shards for pair in shard.names())
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    if _TOTAL in metadata:
        metadata[_TOTAL] = nbytes
    metadata[PACKED] = {"version": _VERSION, "index": content.decode(errors="surrogateescape")}
    weight_map = {new: file for name, file in index["weight_map"].items() for new in names.get(name, [name])}
    return json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2).encode() + b"\n"


def unpack_index(content: bytes, path: Path, shards: Sequence[Shard], nbytes: int) -> bytes:
    """Return the index of the dense shards, given that of the packed ones.

    Raises
    ------
    CheckpointError
        If something has changed it since they were packed.
    """
    try:
        about = parse_json(content, path)["metadata"][PACKED]
        _check_version(about, path)
        dense: bytes = about["index"].encode(errors="surrogateescape")
        same = pack_index(dense, path, shards, nbytes) == content
    except (KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise CheckpointError(f"{path} is not as it was packed: it was written by something else; get the file again")
    return dense
