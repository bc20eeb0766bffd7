"""Pack the N:M tensors of a checkpoint into values and bits, and unpack them to the same bytes."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from masksolve._pattern import Pattern
from masksolve._patterns import PatternsLike, as_patterns
from masksolve._tiles import Direction
from masksolve._words import counted
from masksolve.checkpoint._executors import executor_for, run_all
from masksolve.checkpoint._file import CheckpointError, ChosenTensor, read_header_text
from masksolve.checkpoint._layout import Checkpoint, CheckpointFile, read_checkpoint
from masksolve.checkpoint._pack_work import (
    PackJob,
    find_obstacle,
    pack_unit,
    read_dense,
    read_packed,
    unpack_unit,
    verify_dense,
    verify_packed,
)
from masksolve.checkpoint._packed import (
    PackedUnit,
    Shard,
    make_shard,
    names_of,
    pack_index,
    packed_nbytes,
    read_shard,
    replaced,
    unpack_index,
)
from masksolve.checkpoint._pruned import Pruned, find_pruned
from masksolve.checkpoint._report import as_plain
from masksolve.checkpoint._run import OnProgress, Order, Steps, run
from masksolve.checkpoint._selection import Globs, SkippedTensor, no_tensor_fits
from masksolve.checkpoint._units import Unit, chunks_of, units_of

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that was packed, or unpacked.

    Attributes
    ----------
    name, dtype, shape
        As in the dense checkpoint; dtype in safetensors' words ("F32").
    stack : bool
        Whether it is a stack of matrices (..., rows, columns).
    pattern : Pattern
    direction : {"both", "rows", "columns"}
        That of its groups; only those of columns are packed along the columns.
    dense_nbytes, packed_nbytes : int
        Its bytes in either form, the few of its shape and its names not counted.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stack: bool
    pattern: Pattern
    direction: Direction
    dense_nbytes: int
    packed_nbytes: int

    @classmethod
    def of(cls, tensor: ChosenTensor) -> PackedTensor:
        """Return the record of a tensor."""
        return cls(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            stack=tensor.stack,
            pattern=tensor.pattern,
            direction=tensor.direction,
            dense_nbytes=tensor.nbytes,
            packed_nbytes=packed_nbytes(tensor),
        )


@dataclass(frozen=True, repr=False)
class PackReport:
    """The result of `pack_checkpoint` or `unpack_checkpoint`.

    Attributes
    ----------
    input, output : str
    tensors : tuple of PackedTensor
        Those that were packed, or unpacked.
    skipped : tuple of SkippedTensor
        The others, which are the same in both forms, with the reason.
    identified_by : str
        What says which tensors are N:M, and of which N:M: a record, the model's config, names, or the packed files.
    dense_nbytes, packed_nbytes : int
        The size of all shards in either form.
    seconds : float
        The time that this run took.
    """

    input: str
    output: str
    tensors: tuple[PackedTensor, ...]
    skipped: tuple[SkippedTensor, ...]
    identified_by: str
    dense_nbytes: int
    packed_nbytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        plain: dict[str, Any] = as_plain(self)
        return plain

    def __repr__(self) -> str:
        share = self.packed_nbytes / self.dense_nbytes
        return (
            f"<PackReport of {self.output}: {counted(len(self.tensors), 'tensor')}, {len(self.skipped)} skipped; "
            f"{self.packed_nbytes:,} bytes packed, {share:.2%} of {self.dense_nbytes:,}>"
        )


@dataclass(frozen=True, kw_only=True)
class _Order(Order):
    """The order for either direction; `shards` are the shards that hold packed tensors in the packed form."""

    job: PackJob
    shards: Mapping[str, Shard]

    packing: ClassVar[bool]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors in the packed form, as an index has them."""
        of_shards = [shard.sizes[1] - len(shard.begin) for shard in self.shards.values()]
        # The shapes are tensors too, and among what a packed file begins with.
        shapes = [8 * len(tensor.shape) for shard in self.shards.values() for tensor, _, _ in shard.packed.values()]
        others = [tensor.nbytes for file in self.others for tensor in file.tensors]
        return sum(of_shards) + sum(shapes) + sum(others)

    @property
    def others(self) -> list[CheckpointFile]:
        """The files that hold nothing packed."""
        return [file for file in self.checkpoint.files if file.name not in self.shards]

    @cached_property
    def index(self) -> tuple[CheckpointFile, bytes, bytes] | None:
        """The index of the input, its bytes, and those of the output's; None without an index."""
        file = self.checkpoint.index
        if file is None:
            return None
        path = self.checkpoint.folder / file.name
        before = path.read_bytes()
        return file, before, self.change_index(before, path)

    @abstractmethod
    def change_index(self, content: bytes, path: Path) -> bytes:
        """Return the output's index, given the input's."""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file of the output."""
        index = self.index
        sizes = {file.name: file.size for file in self.others}
        if index is not None:
            sizes[index[0].name] = len(index[2])
        of_output = 1 if self.packing else 0
        return {**sizes, **{name: shard.sizes[of_output] for name, shard in self.shards.items()}}

    def units(self) -> list[Unit]:
        """Return the units of the input."""
        index = self.index
        units: list[Unit] = []
        for file in self.checkpoint.files:
            if file.name in self.shards:
                units += self.shards[file.name].units(packing=self.packing)
            elif index is not None and file.name == index[0].name:
                units.append(replaced(file.name, index[1], index[2]))
            else:
                chunks = chunks_of(file.name, 0, file.size)
                units += [PackedUnit(file.name, each.start, each.stop, moved=each.start) for each in chunks]
        return units


@dataclass(frozen=True, kw_only=True)
class _PackOrder(_Order):
    pattern: PatternsLike | None
    globs: Globs
    identified_by: str

    steps: ClassVar[Steps] = Steps("packing", read_dense, pack_unit, verify_packed)
    packing: ClassVar[bool] = True

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that have to be the same for a run to be resumed, as JSON, by the names that messages use."""
        tensors = [tensor for shard in self.shards.values() for tensor, _, _ in shard.packed.values()]
        return {
            "command": "pack",
            "input": str(self.checkpoint.path),
            "output": str(self.output),
            "pattern": None if self.pattern is None else str(as_patterns(self.pattern)),
            **{name: list(globs) for name, globs in vars(self.globs).items()},
            "what the tensors are identified by": self.identified_by,
            "the hash of what is packed": xxhash.xxh3_128_hexdigest(repr([(t.name, t.to) for t in tensors]).encode()),
        }

    def change_index(self, content: bytes, path: Path) -> bytes:
        """Return the packed shards' index."""
        return pack_index(content, path, list(self.shards.values()), self.nbytes)

    def place(self, units: list[Unit], hashes: dict[str, str], data: Path) -> list[Unit]:
        """Return the units with headers that hold the hashes."""
        headers = {
            name: make_shard(
                name,
                shard.text,
                self.checkpoint.folder / name,
                [tensor for tensor, _, _ in shard.packed.values()],
                hashes,
            ).begin
            for name, shard in self.shards.items()
        }
        return [
            replace(unit, instead=headers[unit.file])
            if isinstance(unit, PackedUnit) and unit.instead is not None and unit.file in headers
            else unit
            for unit in units
        ]


@dataclass(frozen=True, kw_only=True)
class _UnpackOrder(_Order):
    steps: ClassVar[Steps] = Steps("unpacking", read_packed, unpack_unit, verify_dense)
    packing: ClassVar[bool] = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that have to be the same for a run to be resumed, as JSON, by the names that messages use."""
        return {"command": "unpack", "input": str(self.checkpoint.path), "output": str(self.output)}

    def change_index(self, content: bytes, path: Path) -> bytes:
        """Return the dense shards' index."""
        return unpack_index(content, path, list(self.shards.values()), self.nbytes)


def pack_checkpoint(
    source: AnyPath,
    target: AnyPath,
    pattern: PatternsLike | None = None,
    *,
    direction: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: Sequence[str] = (),
    convolution: Sequence[str] = (),
    transposed: Sequence[str] = (),
    record: AnyPath | None = None,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Write a checkpoint of N:M sparse weights as their kept values and a bit per weight.

    At 2:4, 4:8 or 8:16 a bfloat16 matrix takes 9/16 of its bytes. Nothing is lost: `unpack_checkpoint` gives the same
    files back, byte for byte. A tensor that is not N:M, or would not become smaller, stays as it is, with the reason in
    the report. The output appears under its name only when it is complete, and each band of it was read again and
    unpacked to what it was. Weights are held in bands of a few MiB, never whole.

    Parameters
    ----------
    source, target : path
        Two .safetensors files, or two folders: shards with an index, or one shard. Other files are copied.
    pattern, direction, include, exclude, stack, convolution, transposed, record
        As for `check_checkpoint`: the record of the prune says what is N:M, or these do.
    overwrite, resume, workers, on_progress
        As for `prune_checkpoint`; the phases are "checking", "reading", "packing" and "verifying".

    Returns
    -------
    PackReport

    Raises
    ------
    CheckpointError
        As for `check_checkpoint`, for a checkpoint that is packed already, and if no tensor can be packed.
    FileExistsError, OSError
        For an output that exists or cannot be written.
    TypeError, ValueError
        For an invalid pattern, direction or number of workers.
    WorkerLostError
        As for `prune_checkpoint`.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import load_file, save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> dense, packed = Path(folder.name, "dense.safetensors"), Path(folder.name, "packed.safetensors")
    >>> save_file({"layer.weight": np.tile(np.float16([[0, 1, 2, 0]]), (64, 16))}, dense)
    >>> report = pack_checkpoint(dense, packed, "2:4")
    >>> report.tensors[0].packed_nbytes / report.tensors[0].dense_nbytes
    0.5625
    >>> {name: array.shape for name, array in load_file(packed).items()}
    {'layer.shape': (2, 1), 'layer.compressed': (64, 32), 'layer.bitmask': (64, 8)}
    >>> _ = unpack_checkpoint(packed, Path(folder.name, "again.safetensors"))
    >>> Path(folder.name, "again.safetensors").read_bytes() == dense.read_bytes()
    True
    >>> folder.cleanup()
    """
    start = time.perf_counter()
    globs = Globs(include, exclude, stack, convolution, transposed)
    checkpoint = read_checkpoint(Path(source).absolute())
    found = find_pruned(checkpoint, source, pattern, direction, globs, record)
    chosen, skipped = _packable(checkpoint, found, workers, on_progress)
    if not chosen:
        raise CheckpointError(no_tensor_fits("the packed form", skipped))
    order = _PackOrder(
        checkpoint=checkpoint,
        job=PackJob(checkpoint.folder),
        output=Path(target).absolute(),
        overwrite=overwrite,
        resume=resume,
        shards=_shards_of(checkpoint, chosen),
        pattern=pattern,
        globs=globs,
        identified_by=found.by,
    )
    run(order, workers, on_progress)
    return _report(order, skipped, found.by, start)


def unpack_checkpoint(
    source: AnyPath,
    target: AnyPath,
    *,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Write the checkpoint that `pack_checkpoint` packed, the same files byte for byte.

    Parameters
    ----------
    source, target : path
        Two .safetensors files, or two folders.
    overwrite, resume, workers, on_progress
        As for `prune_checkpoint`; the phases are "reading", "unpacking" and "verifying".

    Returns
    -------
    PackReport

    Raises
    ------
    CheckpointError
        For a checkpoint that is not packed, or in a version of the format that this one does not know; for bits that
        are not N:M, values that are not those that were packed, and headers that something else has written.
    FileExistsError, OSError, ValueError, WorkerLostError
        As for `pack_checkpoint`, whose example calls this.
    """
    start = time.perf_counter()
    checkpoint = read_checkpoint(Path(source).absolute(), packed=True)
    shards = {
        file.name: shard for file in checkpoint.files if (shard := read_shard(checkpoint.folder, file)) is not None
    }
    expected = {name: digest for shard in shards.values() for name, digest in shard.hashes.items()}

    def check(hashes: dict[str, str]) -> None:
        for name, found in hashes.items():
            if found != expected[name]:
                raise CheckpointError(
                    f"the values of tensor {name!r} are not those that were packed; get the file again"
                )

    order = _UnpackOrder(
        checkpoint=checkpoint,
        job=PackJob(checkpoint.folder),
        output=Path(target).absolute(),
        overwrite=overwrite,
        resume=resume,
        shards=shards,
    )
    run(order, workers, on_progress, check)
    dense = [tensor for shard in shards.values() for tensor in shard.tensors if tensor.name in shard.moved]
    dense += [tensor for file in order.others for tensor in file.tensors]
    skipped = [SkippedTensor(each.name, each.dtype, each.shape, "was not packed") for each in dense]
    return _report(order, skipped, "the packed files", start)


def _packable(
    checkpoint: Checkpoint, found: Pruned, workers: int | Executor | None, on_progress: OnProgress | None
) -> tuple[list[ChosenTensor], list[SkippedTensor]]:
    """Split the tensors that were pruned into those that can be packed and, with the others, those that cannot."""
    reasons = dict(_reasons_by_name(checkpoint, found.chosen))
    candidates = [tensor for tensor in found.chosen if tensor.name not in reasons]
    units = [unit for unit in units_of(checkpoint, candidates) if unit.tensor is not None]
    total, done = sum(unit.nbytes for unit in units), 0
    obstacles: dict[int, str | None] = {}
    with executor_for(workers, total) as executor:
        calls = [(index, (checkpoint.folder, unit)) for index, unit in enumerate(units)]
        for index, obstacle in run_all(executor, find_obstacle, calls):
            obstacles[index] = obstacle
            done += units[index].nbytes
            if on_progress is not None:
                on_progress("checking", done, total)
    for index, unit in enumerate(units):
        obstacle = obstacles[index]
        if unit.tensor is not None and obstacle is not None:
            reasons.setdefault(unit.tensor.name, obstacle)
    skipped = {each.name: each for each in found.skipped}
    for tensor in found.chosen:
        if tensor.name in reasons:
            skipped[tensor.name] = SkippedTensor(tensor.name, tensor.dtype, tensor.shape, reasons[tensor.name])
    ordered = [skipped[tensor.name] for tensor in checkpoint.tensors if tensor.name in skipped]
    return [tensor for tensor in candidates if tensor.name not in reasons], ordered


def _reasons_by_name(checkpoint: Checkpoint, chosen: Sequence[ChosenTensor]) -> Iterator[tuple[str, str]]:
    """Yield the tensors that cannot be packed whatever they hold, and why."""
    taken = {tensor.name for tensor in checkpoint.tensors}
    for tensor in chosen:
        if packed_nbytes(tensor) >= tensor.nbytes:
            yield tensor.name, f"would not become smaller: {tensor.pattern} keeps too much for a bit per weight"
            continue
        clash = next((name for name in names_of(tensor) if name in taken), None)
        if clash is not None:
            yield tensor.name, f"would be packed as {clash!r}, which is another tensor's name"
            continue
        taken.update(names_of(tensor))


def _shards_of(checkpoint: Checkpoint, chosen: Sequence[ChosenTensor]) -> dict[str, Shard]:
    by_name = {tensor.name: tensor for tensor in chosen}
    shards = {}
    for file in checkpoint.files:
        own = [by_name[tensor.name] for tensor in file.tensors if tensor.name in by_name]
        if own:
            path = checkpoint.folder / file.name
            shards[file.name] = make_shard(file.name, read_header_text(path), path, own)
    return shards


def _report(order: _Order, skipped: Sequence[SkippedTensor], by: str, start: float) -> PackReport:
    tensors = [tensor for shard in order.shards.values() for tensor, _, _ in shard.packed.values()]
    others = sum(file.size for file in order.others if file.tensors)
    return PackReport(
        input=str(order.checkpoint.path),
        output=str(order.output),
        tensors=tuple(PackedTensor.of(tensor) for tensor in tensors),
        skipped=tuple(skipped),
        identified_by=by,
        dense_nbytes=others + sum(shard.sizes[0] for shard in order.shards.values()),
        packed_nbytes=others + sum(shard.sizes[1] for shard in order.shards.values()),
        seconds=time.perf_counter() - start,
    )
