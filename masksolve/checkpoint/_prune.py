"""Prune every weight matrix of a checkpoint, with a proof of optimality for every tile."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import masksolve
from masksolve._certificate import certify
from masksolve._inputs import chunks
from masksolve._methods import load_method
from masksolve._pattern import Pattern
from masksolve._tiles import convolution_matrices
from masksolve.checkpoint._file import CheckpointError, TensorInfo, open_tensor, read_header
from masksolve.checkpoint._report import PrunedTensor, PruneReport
from masksolve.checkpoint._selection import select_tensors


def prune_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    pattern: Pattern,
    *,
    method: str = "exact",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    on_start: Callable[[Sequence[TensorInfo]], None] | None = None,
    on_tensor: Callable[[PrunedTensor], None] | None = None,
) -> PruneReport:
    """Write a copy of a safetensors file in which every weight matrix is transposable N:M sparse.

    The output has the input's header, metadata and bytes, but for the pruned weights, which are +0.0. It appears
    under its name only when it is complete.

    Parameters
    ----------
    source, target : path
        Two different .safetensors files.
    pattern : Pattern
        N **kept** of every M.
    method : str
        As for `masksolve.solve_matrix`.
    include, exclude : sequence of str
        Globs of tensor names. Without `include`, every floating-point matrix that holds a whole tile, but
        embeddings, is pruned.
    overwrite : bool
        Replace an output that exists.
    on_start, on_tensor : callable, optional
        Called with the tensors to prune before the first, and with the record of each when it is done.

    Returns
    -------
    PruneReport

    Raises
    ------
    CheckpointError
        For an input that cannot be read or in which nothing can be pruned, an output equal to the input, and NaN or
        infinite weights.
    FileExistsError, OSError
        For an output that exists or cannot be written. Nothing is left behind.
    """
    source, target = Path(source), Path(target)
    load_method(method, ())
    chosen, skipped = select_tensors(read_header(source), pattern, include, exclude)
    _check_target(source, target, overwrite)
    if on_start is not None:
        on_start(chosen)

    records = []
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        shutil.copyfile(source, unfinished)
        with unfinished.open("r+b") as file:
            for tensor in chosen:
                weights = open_tensor(source, tensor)
                mask, record = _solve_tensor(weights, tensor, pattern, method)
                file.seek(tensor.offset)
                _write_pruned(file, weights, mask)
                records.append(record)
                if on_tensor is not None:
                    on_tensor(record)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()
    return PruneReport(
        masksolve_version=masksolve.__version__,
        input=str(source),
        output=str(target),
        pattern=pattern,
        method=method,
        include=tuple(include),
        exclude=tuple(exclude),
        tensors=tuple(records),
        skipped=tuple(skipped),
    )


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.exists():
        if target.samefile(source):
            raise CheckpointError(f"the output {target} is the input; name another file")
        if target.is_dir():
            raise IsADirectoryError(f"the output {target} is a folder; name a file in it")
        if not overwrite:
            raise FileExistsError(f"the output {target} exists; name another file, or pass --overwrite")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the output's folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"the output's folder {target.parent} is not writable")


def _solve_tensor(
    weights: NDArray[Any], tensor: TensorInfo, pattern: Pattern, method: str
) -> tuple[NDArray[np.bool_], PrunedTensor]:
    """The mask of a tensor, shaped like it, and the record of what it keeps."""
    n, m = pattern.n, pattern.m
    matrices = convolution_matrices(weights)
    try:
        start = time.perf_counter()
        mask = masksolve.solve_matrix(matrices, n, m, method=method)
    except ValueError as error:
        raise CheckpointError(f"tensor {tensor.name!r}: {error}") from error
    solved = time.perf_counter()
    certificate = certify(matrices, mask, n, m)
    record = PrunedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        importance=_importance(weights),
        kept=certificate.kept,
        gap=certificate.gap,
        optimal=certificate.optimal,
        solve_seconds=solved - start,
        certify_seconds=time.perf_counter() - solved,
    )
    return np.moveaxis(mask, (-2, -1), (0, 1)), record


def _importance(weights: NDArray[Any]) -> float:
    return sum(float(np.abs(chunk.astype(np.float64)).sum()) for _, chunk in chunks(weights))


def _write_pruned(file: Any, weights: NDArray[Any], mask: NDArray[np.bool_]) -> None:
    """Write the weights with +0.0 where the mask is False, at the file's position."""
    for (_, part), (_, kept) in zip(chunks(weights), chunks(mask), strict=True):
        pruned = np.array(part)
        pruned[~kept] = 0
        file.write(pruned.tobytes())
