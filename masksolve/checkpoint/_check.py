"""Check that the weight matrices of a checkpoint are N:M sparse."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksolve._check import find_bad_group
from masksolve._pattern import Pattern
from masksolve._patterns import PatternsLike
from masksolve._tiles import Direction, convolution_matrices
from masksolve.checkpoint._executors import executor_for, run_all
from masksolve.checkpoint._layout import read_checkpoint
from masksolve.checkpoint._pruned import find_pruned
from masksolve.checkpoint._report import as_plain
from masksolve.checkpoint._run import OnProgress
from masksolve.checkpoint._selection import Globs, SkippedTensor
from masksolve.checkpoint._units import Unit, pieces_of, read_weights, units_of
from masksolve.checkpoint._work import in_tensor


@dataclass(frozen=True)
class TensorCheck:
    """The verdict on one tensor.

    Attributes
    ----------
    name : str
    shape : tuple of int
    pattern : Pattern
    direction : {"both", "rows", "columns"}
        What it was checked for; "both" is transposable.
    problem : str or None
        Its first bad group, or None if there is none.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    direction: Direction
    problem: str | None


@dataclass(frozen=True, repr=False)
class CheckReport:
    """The result of `check_checkpoint`.

    Attributes
    ----------
    tensors : tuple of TensorCheck
        Those that were checked, with what is wrong, if anything is.
    skipped : tuple of SkippedTensor
        The others, with the reason.
    identified_by : str
        What says which tensors to check: the record of the prune, the model's config, or names.
    recorded : bool
        Whether it is a record, which says what was pruned; the others say what would be.
    """

    tensors: tuple[TensorCheck, ...]
    skipped: tuple[SkippedTensor, ...]
    identified_by: str
    recorded: bool

    @property
    def passed(self) -> bool:
        """Whether no tensor has a problem."""
        return all(tensor.problem is None for tensor in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {**as_plain(self), "passed": self.passed}

    def __repr__(self) -> str:
        bad = [tensor for tensor in self.tensors if tensor.problem is not None]
        first = f", the first {bad[0].name!r}: {bad[0].problem}" if bad else ""
        return f"<CheckReport: {len(bad)} of {len(self.tensors)} tensors are bad{first}; {len(self.skipped)} skipped>"


def check_checkpoint(
    path: str | os.PathLike[str],
    pattern: PatternsLike | None = None,
    *,
    direction: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: Sequence[str] = (),
    convolution: Sequence[str] = (),
    transposed: Sequence[str] = (),
    record: str | os.PathLike[str] | None = None,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> CheckReport:
    """Check every tensor that was pruned: at most N nonzeros in every group of M.

    The record that `prune_checkpoint` and `masksolve adaprune` leave in a folder, masksolve.json, says which tensors
    these are. Without one, or with `include`, `stack`, `convolution` or `transposed` and no `record`, they are those
    that `prune_checkpoint` would prune.

    Parameters
    ----------
    path : path
        A `.safetensors` file, or a folder of them with an index.
    pattern : str, (int, int), Pattern or mapping, optional
        N **kept** of every M, or of the tensors that each glob matches. By default what the record says of each tensor;
        needed where none is read.
    direction : {"both", "rows", "columns"}, optional
        "both": transposable; "rows", "columns": one-sided. By default what the record says of each tensor, and "both"
        without one.
    include, exclude, stack, convolution, transposed, workers, on_progress
        As for `prune_checkpoint`.
    record : path, optional
        The JSON report of the prune, or a record, to read instead.

    Returns
    -------
    CheckReport

    Raises
    ------
    CheckpointError
        For a checkpoint that cannot be read, or in which no tensor fits the pattern; for a record that is corrupt or of
        another checkpoint; for `stack` and the like beside `record`, and without `pattern` if no record is read.
    TypeError, ValueError
        For an invalid pattern, direction or number of workers.

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
    globs = Globs(include, exclude, stack, convolution, transposed)
    checkpoint = read_checkpoint(Path(path).absolute())
    found = find_pruned(checkpoint, path, pattern, direction, globs, record)
    chosen = found.chosen
    units = [unit for unit in units_of(checkpoint, chosen) if unit.tensor is not None]
    calls = [(index, (checkpoint.folder, unit)) for index, unit in enumerate(units)]
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
    checks = tuple(
        TensorCheck(tensor.name, tensor.shape, tensor.pattern, tensor.direction, first.get(tensor.name))
        for tensor in chosen
    )
    return CheckReport(checks, tuple(found.skipped), found.by, found.recorded)


def check_unit(folder: Path, unit: Unit) -> str | None:
    """Return the first bad group of a band, in words."""
    assert unit.tensor is not None
    pattern, direction = unit.tensor.pattern, unit.tensor.direction
    for piece in pieces_of(unit):
        mask = convolution_matrices(read_weights(folder, unit, piece) != 0)
        bad = find_bad_group(mask, pattern, False, direction)
        if bad is not None:
            return in_tensor(bad, unit, piece).describe(pattern, False)
    return None
