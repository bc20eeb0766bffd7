"""Check that the weight matrices of a checkpoint are N:M sparse."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from masksolve._check import find_bad_group
from masksolve._pattern import Pattern
from masksolve._tiles import convolution_matrices
from masksolve.checkpoint._engine import executor_for, run_all
from masksolve.checkpoint._layout import read_checkpoint
from masksolve.checkpoint._run import OnProgress
from masksolve.checkpoint._selection import SkippedTensor, select_tensors
from masksolve.checkpoint._units import Unit, pieces_of, read_weights, units_of


@dataclass(frozen=True)
class TensorCheck:
    """Whether a tensor is transposable N:M sparse; `problem` names its first bad group, or is None."""

    name: str
    shape: tuple[int, ...]
    problem: str | None


def check_checkpoint(
    path: str | os.PathLike[str],
    pattern: Pattern,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> tuple[list[TensorCheck], list[SkippedTensor]]:
    """Check every tensor that `prune_checkpoint` would prune: at most N nonzeros in every group of M, both ways.

    Parameters
    ----------
    path : path
        A `.safetensors` file, or a folder of them with an index.
    pattern, include, exclude, workers, on_progress
        As for `prune_checkpoint`.

    Returns
    -------
    checks : list of TensorCheck
        What is wrong with each tensor, if anything is.
    skipped : list of SkippedTensor
        The others, with the reason.

    Raises
    ------
    CheckpointError
        For a checkpoint that cannot be read, or in which no tensor fits the pattern.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source = Path(folder.name, "in.safetensors")
    >>> save_file({"w": np.arange(64.0).reshape(8, 8), "step": np.array(7)}, source)
    >>> checks, skipped = check_checkpoint(source, Pattern(2, 4))
    >>> checks[0].problem
    'mask[0, 0:4] keeps 3 of 4 entries; 2:4 along rows allows at most 2'
    >>> folder.cleanup()
    """
    checkpoint = read_checkpoint(Path(path).absolute())
    chosen, skipped = select_tensors(checkpoint.tensors, pattern, include, exclude)
    units = [unit for unit in units_of(checkpoint, chosen, pattern) if unit.tensor is not None]
    calls = [(index, (checkpoint.folder, unit, pattern)) for index, unit in enumerate(units)]
    total, done = sum(unit.nbytes for unit in units), 0
    problems: dict[int, str | None] = {}
    with executor_for(workers, total) as executor:
        for index, problem in run_all(executor, check_unit, calls):
            problems[index] = problem
            done += units[index].nbytes
            if on_progress is not None:
                on_progress("checking", done, total)
    first: dict[str, str] = {}
    for index, unit in enumerate(units):
        problem = problems[index]
        if unit.tensor is not None and problem is not None:
            first.setdefault(unit.tensor.name, problem)
    return [TensorCheck(tensor.name, tensor.shape, first.get(tensor.name)) for tensor in chosen], skipped


def check_unit(folder: Path, unit: Unit, pattern: Pattern) -> str | None:
    """The first bad group of a band, in words."""
    for piece in pieces_of(unit, pattern):
        mask = convolution_matrices(read_weights(folder, unit, piece) != 0)
        bad = find_bad_group(mask, pattern, False, "both")
        if bad is not None:
            return bad.moved(piece.rows.start, piece.columns.start).describe(pattern, False)
    return None
