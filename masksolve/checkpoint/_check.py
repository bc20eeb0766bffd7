"""Check that the weight matrices of a checkpoint are N:M sparse."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from masksolve._check import find_bad_group
from masksolve._kinds import Kind
from masksolve._pattern import Pattern, PatternLike, as_pattern
from masksolve._tiles import convolution_matrices
from masksolve.checkpoint._executors import executor_for, run_all
from masksolve.checkpoint._identify import identify
from masksolve.checkpoint._layout import Checkpoint, read_checkpoint
from masksolve.checkpoint._record import RECORD, read_record
from masksolve.checkpoint._run import OnProgress
from masksolve.checkpoint._selection import Given, Globs, SkippedTensor, select_tensors
from masksolve.checkpoint._units import Unit, pieces_of, read_weights, units_of
from masksolve.checkpoint._work import in_tensor


@dataclass(frozen=True)
class TensorCheck:
    """Whether a tensor is transposable N:M sparse; `problem` names its first bad group, or is None."""

    name: str
    shape: tuple[int, ...]
    problem: str | None


@dataclass(frozen=True)
class CheckReport:
    """What `check_checkpoint` found.

    Attributes
    ----------
    tensors : tuple of TensorCheck
        What is wrong with each tensor that was checked, if anything is.
    skipped : tuple of SkippedTensor
        The others, with the reason.
    identified_by : str
        What tells which tensors to check: the record of the prune, the model's config, or names.
    recorded : bool
        Whether it is a record, which says what was pruned; the others say what would be.
    """

    tensors: tuple[TensorCheck, ...]
    skipped: tuple[SkippedTensor, ...]
    identified_by: str
    recorded: bool


def check_checkpoint(
    path: str | os.PathLike[str],
    pattern: PatternLike,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: Sequence[str] = (),
    convolution: Sequence[str] = (),
    record: str | os.PathLike[str] | None = None,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> CheckReport:
    """Check every tensor that was pruned: at most N nonzeros in every group of M, both ways.

    Which these are is read from the record that `prune_checkpoint` and `masksolve adaprune` leave in a folder,
    masksolve.json. Without one, or with `include`, `stack` or `convolution`, they are those that `prune_checkpoint`
    would prune.

    Parameters
    ----------
    path : path
        A `.safetensors` file, or a folder of them with an index.
    pattern, include, exclude, stack, convolution, workers, on_progress
        As for `prune_checkpoint`.
    record : path, optional
        The JSON report of the prune, or a record, to read instead.

    Returns
    -------
    CheckReport

    Raises
    ------
    CheckpointError
        For a checkpoint that cannot be read, or in which no tensor fits the pattern, and for a record that is spoilt or
        of another checkpoint.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source = Path(folder.name, "in.safetensors")
    >>> save_file({"w": np.arange(64.0).reshape(8, 8), "step": np.array(7)}, source)
    >>> check_checkpoint(source, "2:4").tensors[0].problem
    'mask[0, 0:4] keeps 3 of 4 entries; 2:4 along rows allows at most 2'
    >>> folder.cleanup()
    """
    pattern = as_pattern(pattern)
    checkpoint = read_checkpoint(Path(path).absolute())
    globs = Globs(include, exclude, stack, convolution)
    path_of_record = Path(record) if record is not None else _record_beside(checkpoint, globs)
    if path_of_record is not None:
        decided: Mapping[str, Kind] | Given = read_record(path_of_record, checkpoint.tensors)
        by = path_of_record.name
    else:
        identified = identify(checkpoint)
        decided, by = identified.kinds, identified.by
    chosen, skipped = select_tensors(checkpoint.tensors, pattern, globs, decided)
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
    checks = tuple(TensorCheck(tensor.name, tensor.shape, first.get(tensor.name)) for tensor in chosen)
    return CheckReport(checks, tuple(skipped), by, path_of_record is not None)


def _record_beside(checkpoint: Checkpoint, globs: Globs) -> Path | None:
    """The record of the prune, unless the user says which tensors to check."""
    if globs.include or globs.stack or globs.convolution or not checkpoint.is_folder:
        return None
    path = checkpoint.folder / RECORD
    return path if path.exists() else None


def check_unit(folder: Path, unit: Unit, pattern: Pattern) -> str | None:
    """The first bad group of a band, in words."""
    for piece in pieces_of(unit, pattern):
        mask = convolution_matrices(read_weights(folder, unit, piece) != 0)
        bad = find_bad_group(mask, pattern, False, "both")
        if bad is not None:
            return in_tensor(bad, unit, piece).describe(pattern, False)
    return None
