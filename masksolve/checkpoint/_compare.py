"""Compare two checkpoints, tensor by tensor."""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from masksolve._words import counted
from masksolve.checkpoint._executors import executor_for, run_all
from masksolve.checkpoint._file import WEIGHT_DTYPES, TensorInfo
from masksolve.checkpoint._layout import Checkpoint, read_checkpoint
from masksolve.checkpoint._report import as_plain
from masksolve.checkpoint._run import OnProgress
from masksolve.checkpoint._units import fill
from masksolve.checkpoint._work import narrow_as_float32

# A multiple of the size of every dtype.
_BYTES_A_CHUNK = 1 << 24


@dataclass(frozen=True)
class TensorComparison:
    """The differences of one tensor of two checkpoints.

    Attributes
    ----------
    name : str
    difference : str or None
        "only in the first", "only in the second", "F32 8x8, then F16 8x8", or None where dtype and shape agree.
    entries, changed, zeroed : int
        All entries, those whose bits differ, and those that only the second has as zero.
    zeros : tuple of int
        Zeros in the first and in the second.
    importance : tuple of float
        Sum of abs(weights) in the first and in the second; 0.0 for dtypes that are not pruned.
    """

    name: str
    difference: str | None
    entries: int = 0
    changed: int = 0
    zeroed: int = 0
    zeros: tuple[int, int] = (0, 0)
    importance: tuple[float, float] = (0.0, 0.0)

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return self.difference is None and self.changed == 0


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare_checkpoints`.

    Attributes
    ----------
    tensors : tuple of TensorComparison
        Every tensor of either.
    files : tuple of str
        How other files, and the metadata of shards, differ, in words.
    """

    tensors: tuple[TensorComparison, ...]
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON has it."""
        plain: dict[str, Any] = as_plain(self)
        return plain

    def __repr__(self) -> str:
        changed = sum(not tensor.is_same for tensor in self.tensors)
        files = counted(len(self.files), "file")
        return f"<Comparison: {changed} of {len(self.tensors)} tensors differ, and {files} beside them>"


def compare_checkpoints(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    *,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Compare two checkpoints, files or folders, whatever their shards.

    Parameters
    ----------
    first, second : path
        `.safetensors` files, or folders of them with an index; tensors of any shape and dtype.
    workers, on_progress
        As for `prune_checkpoint`.

    Returns
    -------
    Comparison
        Every tensor of either, with the number of entries that differ, and which other files differ.

    Raises
    ------
    CheckpointError
        For a checkpoint that cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = Path(folder.name, "in.safetensors"), Path(folder.name, "out.safetensors")
    >>> save_file({"w": np.arange(64.0).reshape(8, 8), "step": np.array(7)}, source)
    >>> save_file({"w": np.arange(64.0).reshape(8, 8) // 2, "step": np.array(7)}, target)
    >>> [(tensor.name, tensor.changed) for tensor in compare_checkpoints(source, target).tensors]
    [('step', 0), ('w', 63)]
    >>> folder.cleanup()
    """
    a, b = read_checkpoint(Path(first).absolute()), read_checkpoint(Path(second).absolute())
    in_a, in_b = _places(a), _places(b)
    calls = []
    for name in in_a:
        if name in in_b and _difference(in_a[name][1], in_b[name][1]) is None:
            calls += [(name, arguments) for arguments in _chunks(*in_a[name], *in_b[name])]
    total, done = sum(call[1][4] for call in calls), 0
    found: dict[str, list[TensorComparison]] = {}
    with executor_for(workers, total) as executor:
        numbered = [((name, index), arguments) for index, (name, arguments) in enumerate(calls)]
        for (name, index), part in run_all(executor, compare_chunk, numbered):
            found.setdefault(name, []).append(part)
            done += calls[index][1][4]
            if on_progress is not None:
                on_progress("comparing", done, total)
    tensors = []
    for name in [*in_a, *(name for name in in_b if name not in in_a)]:
        if name not in in_b or name not in in_a:
            tensors.append(TensorComparison(name, "only in the first" if name in in_a else "only in the second"))
        else:
            tensors.append(_merged(name, _difference(in_a[name][1], in_b[name][1]), found.get(name, [])))
    return Comparison(tuple(tensors), tuple(_other_differences(a, b)))


def compare_chunk(a: Path, start_a: int, b: Path, start_b: int, nbytes: int, tensor: TensorInfo) -> TensorComparison:
    """Compare the same bytes of a tensor in two files."""
    parts = []
    for path, start in ((a, start_a), (b, start_b)):
        content = memoryview(bytearray(nbytes))
        with path.open("rb", buffering=0) as file:
            fill(file, path, start, content)
        parts.append(content)
    # Entries of less than a byte are compared byte by byte.
    itemsize = max(1, tensor.nbytes // math.prod(tensor.shape))
    bits = [np.frombuffer(part, f"u{itemsize}") for part in parts]
    differ = bits[0] != bits[1]
    if tensor.dtype not in WEIGHT_DTYPES:
        return TensorComparison(tensor.name, None, len(differ), int(differ.sum()))
    weights = [narrow_as_float32(np.frombuffer(part, WEIGHT_DTYPES[tensor.dtype])) for part in parts]
    zero = [part == 0 for part in weights]
    with np.errstate(over="ignore", invalid="ignore"):
        importance = [float(np.abs(part).sum(dtype=np.float64)) for part in weights]
    return TensorComparison(
        tensor.name,
        None,
        len(differ),
        int(differ.sum()),
        int((zero[1] & ~zero[0]).sum()),
        (int(zero[0].sum()), int(zero[1].sum())),
        (importance[0], importance[1]),
    )


def _places(checkpoint: Checkpoint) -> dict[str, tuple[Path, TensorInfo]]:
    return {
        tensor.name: (checkpoint.folder / file.name, tensor) for file in checkpoint.files for tensor in file.tensors
    }


def _chunks(
    a: Path, tensor_a: TensorInfo, b: Path, tensor_b: TensorInfo
) -> Iterator[tuple[Path, int, Path, int, int, TensorInfo]]:
    for at in range(0, tensor_a.nbytes, _BYTES_A_CHUNK):
        nbytes = min(_BYTES_A_CHUNK, tensor_a.nbytes - at)
        yield a, tensor_a.offset + at, b, tensor_b.offset + at, nbytes, tensor_a


def _difference(a: TensorInfo, b: TensorInfo) -> str | None:
    if (a.dtype, a.shape) == (b.dtype, b.shape):
        return None
    described = [f"{tensor.dtype} {'x'.join(map(str, tensor.shape)) or 'scalar'}" for tensor in (a, b)]
    return f"{described[0]}, then {described[1]}"


def _merged(name: str, difference: str | None, parts: list[TensorComparison]) -> TensorComparison:
    return TensorComparison(
        name,
        difference,
        sum(part.entries for part in parts),
        sum(part.changed for part in parts),
        sum(part.zeroed for part in parts),
        (sum(part.zeros[0] for part in parts), sum(part.zeros[1] for part in parts)),
        (math.fsum(part.importance[0] for part in parts), math.fsum(part.importance[1] for part in parts)),
    )


def _other_differences(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    files_a, files_b = ({file.name: file for file in checkpoint.files} for checkpoint in (a, b))
    if not a.is_folder and not b.is_folder:
        # Two single files are each other's counterpart, whatever they are called.
        files_b = dict(zip(files_a, files_b.values(), strict=True))
    for name in sorted({*files_a, *files_b}):
        if name not in files_b or name not in files_a:
            yield f"{name}: only in the {'first' if name in files_a else 'second'}"
        elif files_a[name].tensors or files_b[name].tensors:
            if files_a[name].header.metadata != files_b[name].header.metadata:
                yield f"{name}: other metadata"
        elif not filecmp.cmp(a.folder / name, b.folder / files_b[name].name, shallow=False):
            yield f"{name}: other content"
