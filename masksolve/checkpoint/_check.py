"""Check that the weight matrices of a checkpoint are N:M sparse."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksolve._check import find_bad_group
from masksolve._inputs import check_direction
from masksolve._kinds import Kind
from masksolve._pattern import Pattern, PatternLike, as_pattern
from masksolve._tiles import Direction, convolution_matrices
from masksolve.checkpoint._executors import executor_for, run_all
from masksolve.checkpoint._file import CheckpointError, TensorInfo
from masksolve.checkpoint._identify import identify
from masksolve.checkpoint._layout import Checkpoint, read_checkpoint
from masksolve.checkpoint._record import RECORD, Pruned, read_record
from masksolve.checkpoint._report import as_plain
from masksolve.checkpoint._run import OnProgress
from masksolve.checkpoint._selection import Given, Globs, SkippedTensor, no_tensor_fits, split_tensors
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
    pattern: PatternLike | None = None,
    *,
    direction: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: Sequence[str] = (),
    convolution: Sequence[str] = (),
    record: str | os.PathLike[str] | None = None,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> CheckReport:
    """Check every tensor that was pruned: at most N nonzeros in every group of M.

    The record that `prune_checkpoint` and `masksolve adaprune` leave in a folder, masksolve.json, says which tensors
    these are. Without one, or with `include`, `stack` or `convolution` and no `record`, they are those that
    `prune_checkpoint` would prune.

    Parameters
    ----------
    path : path
        A `.safetensors` file, or a folder of them with an index.
    pattern : str, (int, int) or Pattern, optional
        N **kept** of every M. By default what the record says of each tensor; needed where none is read.
    direction : {"both", "rows", "columns"}, optional
        "both": transposable; "rows", "columns": one-sided. By default what the record says of each tensor, and "both"
        without one.
    include, exclude, stack, convolution, workers, on_progress
        As for `prune_checkpoint`.
    record : path, optional
        The JSON report of the prune, or a record, to read instead.

    Returns
    -------
    CheckReport

    Raises
    ------
    CheckpointError
        For a checkpoint that cannot be read, or in which no tensor fits the pattern; for a record that is spoilt or of
        another checkpoint; for `stack` or `convolution` beside `record`, and without `pattern` if no record is read.
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
    asked = None if pattern is None else as_pattern(pattern)
    asked_direction = None if direction is None else check_direction(direction)
    if record is not None and (stack or convolution):
        raise CheckpointError("`record` says which tensors are stacks; leave out `stack` and `convolution`")
    checkpoint = read_checkpoint(Path(path).absolute())
    globs = Globs(include, exclude, stack, convolution)
    path_of_record = Path(record) if record is not None else _record_beside(checkpoint, globs)
    searches: list[_Search]
    if path_of_record is not None:
        pruned = read_record(path_of_record, checkpoint.tensors)
        searches = _searches_of(pruned, asked, asked_direction, f"left dense, says {path_of_record.name}")
        by = path_of_record.name
    elif asked is None:
        if _record_beside(checkpoint, Globs()) is not None:
            raise CheckpointError(
                f"with `include`, `stack` or `convolution` {RECORD} in {path} is not read; "
                "give `pattern`, or the file as `record`"
            )
        raise CheckpointError(f"no record says to which pattern {path} was pruned; give `pattern`")
    else:
        identified = identify(checkpoint)
        searches = [_Search(asked, asked_direction or "both", identified.kinds)]
        by = identified.by
    found = [
        (search, *split_tensors(checkpoint.tensors, search.pattern, search.direction, globs, search.decided))
        for search in searches
    ]
    skipped = _skipped_by_all(checkpoint, found)
    if len(skipped) == len(checkpoint.tensors):
        raise CheckpointError(no_tensor_fits(searches[0].pattern, skipped))
    work = [
        (search, unit)
        for search, chosen, _ in found
        for unit in units_of(checkpoint, chosen, search.pattern)
        if unit.tensor is not None
    ]
    calls = [
        (index, (checkpoint.folder, unit, search.pattern, search.direction))
        for index, (search, unit) in enumerate(work)
    ]
    total, done = sum(unit.nbytes for _, unit in work), 0
    problems: dict[int, str | None] = {}
    with executor_for(workers, total) as executor:
        for index, problem in run_all(executor, check_unit, calls):
            problems[index] = problem
            done += work[index][1].nbytes
            if on_progress is not None:
                on_progress("checking", done, total)
    first: dict[str, str] = {}
    for index, (_, unit) in enumerate(work):
        problem = problems[index]
        if unit.tensor is not None and problem is not None:
            first.setdefault(unit.tensor.name, problem)
    checks = {
        tensor.name: TensorCheck(tensor.name, tensor.shape, search.pattern, search.direction, first.get(tensor.name))
        for search, chosen, _ in found
        for tensor in chosen
    }
    in_order = tuple(checks[tensor.name] for tensor in checkpoint.tensors if tensor.name in checks)
    return CheckReport(in_order, skipped, by, path_of_record is not None)


@dataclass(frozen=True)
class _Search:
    """A pattern and direction to check for, and the tensors to check."""

    pattern: Pattern
    direction: Direction
    decided: Mapping[str, Kind] | Given


def _searches_of(
    pruned: Mapping[str, Pruned], pattern: Pattern | None, direction: Direction | None, otherwise: str
) -> list[_Search]:
    """Return one search for each pattern and direction of a record; those that were asked for replace its own."""
    stacks: dict[tuple[Pattern, Direction], dict[str, bool]] = {}
    for name, line in pruned.items():
        stacks.setdefault((pattern or line.pattern, direction or line.direction), {})[name] = line.stack
    return [_Search(*constraint, Given(names, otherwise)) for constraint, names in stacks.items()]


def _skipped_by_all(
    checkpoint: Checkpoint, found: Sequence[tuple[_Search, list[TensorInfo], list[SkippedTensor]]]
) -> tuple[SkippedTensor, ...]:
    chosen = {tensor.name for _, tensors, _ in found for tensor in tensors}
    skipped: dict[str, SkippedTensor] = {}
    for search, _, tensors in found:
        for tensor in tensors:
            # The search that looked for it has the reason.
            is_its_own = isinstance(search.decided, Given) and tensor.name in search.decided.stacks
            if tensor.name not in chosen and (is_its_own or tensor.name not in skipped):
                skipped[tensor.name] = tensor
    return tuple(skipped[tensor.name] for tensor in checkpoint.tensors if tensor.name in skipped)


def _record_beside(checkpoint: Checkpoint, globs: Globs) -> Path | None:
    """Return the record of the prune, unless the user says which tensors to check."""
    if globs.include or globs.stack or globs.convolution or not checkpoint.is_folder:
        return None
    path = checkpoint.folder / RECORD
    return path if path.exists() else None


def check_unit(folder: Path, unit: Unit, pattern: Pattern, direction: Direction) -> str | None:
    """Return the first bad group of a band, in words."""
    for piece in pieces_of(unit, pattern):
        mask = convolution_matrices(read_weights(folder, unit, piece) != 0)
        bad = find_bad_group(mask, pattern, False, direction)
        if bad is not None:
            return in_tensor(bad, unit, piece).describe(pattern, False)
    return None
