"""Choose N of M for each weight matrix of a checkpoint, so that all of them together meet a budget."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from masksolve._inputs import check_direction
from masksolve._pattern import Pattern
from masksolve._patterns import as_patterns
from masksolve._tiles import Direction, convolution_matrices
from masksolve._words import counted, one_sided
from masksolve.budget import Budget, Curve, budget_of, check_budget, curve_of
from masksolve.checkpoint._executors import executor_for, run_all
from masksolve.checkpoint._file import CheckpointError, ChosenTensor
from masksolve.checkpoint._identify import identify
from masksolve.checkpoint._layout import read_checkpoint
from masksolve.checkpoint._report import as_plain
from masksolve.checkpoint._run import OnProgress
from masksolve.checkpoint._selection import (
    Asked,
    Globs,
    SkippedTensor,
    as_checkpoint_error,
    no_tensor_fits,
    split_tensors,
)
from masksolve.checkpoint._units import Unit, pieces_of, read_weights, units_of
from masksolve.checkpoint._work import Job, SolveMasks, check_finite, narrow_as_float32, try_method


@dataclass(frozen=True, repr=False)
class CheckpointBudget:
    """The result of `budget_checkpoint`.

    Attributes
    ----------
    input : str
    direction : {"both", "rows", "columns"}
    budget : Budget
        The choice, with the figures that it was made from: the kept importance and the number of kept weights of each
        tensor at each n.
    tensors : tuple of ChosenTensor
        The tensors to prune, and to what.
    importance : tuple of float
        Sum of abs(weights) of each of them.
    skipped : tuple of SkippedTensor
        The others, with the reason; they do not count.
    identified_by : str
        What distinguishes weights from embeddings and the like: the model's config, or the names of tensors.
    seconds : float
        The time that this took.
    """

    input: str
    direction: Direction
    budget: Budget
    tensors: tuple[ChosenTensor, ...]
    importance: tuple[float, ...]
    skipped: tuple[SkippedTensor, ...]
    identified_by: str
    seconds: float

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns by globs, for `prune_checkpoint`."""
        return self.budget.patterns

    @property
    def kept_importance(self) -> float:
        """Kept importance of all these tensors together, as a share of theirs; 1.0 for weights that are all zero."""
        return self._share(self.budget.value)

    @property
    def uniform_kept_importance(self) -> float | None:
        """The same if all of them get the pattern `budget.uniform`; None if there is none within the budget."""
        value = self.budget.uniform_value
        return None if value is None else self._share(value)

    def _share(self, kept: float) -> float:
        everything = math.fsum(self.importance)
        return kept / everything if everything > 0 else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it."""
        return {
            **as_plain(self),
            "budget": self.budget.to_dict(),
            "kept_importance": self.kept_importance,
            "uniform_kept_importance": self.uniform_kept_importance,
        }

    def __repr__(self) -> str:
        budget = self.budget
        beside = (
            ""
            if budget.uniform is None
            else f", {self.uniform_kept_importance:.2%} at {budget.uniform} for all of them"
        )
        return (
            f"<CheckpointBudget: {counted(len(self.tensors), 'tensor')}, {budget.least} to {budget.most} of {budget.m}"
            f"{one_sided(self.direction)}, {len(self.skipped)} skipped, density {budget.density:.4g} (asked for "
            f"{budget.asked:.4g}), kept importance {self.kept_importance:.2%}{beside}>"
        )


def budget_checkpoint(
    source: str | os.PathLike[str],
    m: int,
    density: float,
    *,
    least: int = 1,
    most: int | None = None,
    direction: str = "both",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: Sequence[str] = (),
    convolution: Sequence[str] = (),
    transposed: Sequence[str] = (),
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> CheckpointBudget:
    """Choose N of M for each tensor that `prune_checkpoint` would prune, so that they keep the most importance.

    Every tensor is solved for every n, which takes about most - least times as long as to prune it. Weights are held in
    bands of a few MiB, never whole. Nothing is written.

    Parameters
    ----------
    source : path
        A `.safetensors` file, or a folder of them with an index.
    m : int
        Length of a group.
    density : float
        The share of the weights of all tensors that are pruned that may be kept; those that are skipped do not count.
    least, most : int
        Bounds of every n; by default 1, so that no tensor is zeroed whole, and m, which leaves one dense.
    direction, include, exclude, stack, convolution, transposed
        As for `prune_checkpoint`, and the same as then.
    workers, on_progress
        As for `prune_checkpoint`.

    Returns
    -------
    CheckpointBudget
        Its `patterns` are a `pattern` for `prune_checkpoint`.

    Raises
    ------
    CheckpointError
        For a checkpoint that cannot be read or in which no tensor fits m, NaN or infinite weights, bounds and densities
        out of range, and a budget that cannot be met.
    TypeError, ValueError
        For an invalid m, direction or number of workers.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source = Path(folder.name, "in.safetensors")
    >>> rng = np.random.default_rng(0)
    >>> save_file({"a.weight": rng.standard_normal((16, 16)), "b.weight": 3 * np.eye(16)}, source)
    >>> found = budget_checkpoint(source, 4, 0.5)
    >>> {name: str(pattern) for name, pattern in found.patterns.items()}
    {'a.weight': '3:4', 'b.weight': '1:4'}
    >>> folder.cleanup()
    """
    with as_checkpoint_error():
        m, least, most = check_budget(m, density, least, most)
    start = time.perf_counter()
    checked_direction = check_direction(direction)
    checkpoint = read_checkpoint(Path(source).absolute())
    identified = identify(checkpoint)
    globs = Globs(include, exclude, stack, convolution, transposed)
    # Which tensors fit depends on m alone.
    asked = Asked(identified.kinds, as_patterns((most, m)), checked_direction)
    chosen, skipped = split_tensors(checkpoint.tensors, globs, asked)
    if not chosen:
        raise CheckpointError(no_tensor_fits(f"groups of {m}", skipped))
    choices = range(least, most + 1)
    units = [unit for unit in units_of(checkpoint, chosen) if unit.tensor is not None]
    total, done = sum(unit.nbytes for unit in units), 0
    measured: dict[int, tuple[float, Curve]] = {}
    with executor_for(workers, total) as executor:
        # One first, so that the others find its code on the disk.
        tried = [replace(tensor, to=replace(tensor.to, pattern=Pattern(n, m))) for n in choices for tensor in chosen]
        list(run_all(executor, try_method, [(0, (Job(checkpoint.folder, SolveMasks("exact")), tried))]))
        calls = [(index, (checkpoint.folder, unit, choices)) for index, unit in enumerate(units)]
        for index, figures in run_all(executor, measure_unit, calls):
            measured[index] = figures
            done += units[index].nbytes
            if on_progress is not None:
                on_progress("measuring", done, total)
    parts: dict[str, list[tuple[float, Curve]]] = {}
    for index, unit in enumerate(units):
        assert unit.tensor is not None
        parts.setdefault(unit.tensor.name, []).append(measured[index])
    with as_checkpoint_error():
        budget = budget_of(
            {tensor.name: _sum_of([curve for _, curve in parts[tensor.name]]) for tensor in chosen},
            {tensor.name: math.prod(tensor.shape) for tensor in chosen},
            density,
            m=m,
            least=least,
            most=most,
        )
    patterns = {layer.name: layer.pattern for layer in budget.layers}
    return CheckpointBudget(
        input=str(checkpoint.path),
        direction=checked_direction,
        budget=budget,
        tensors=tuple(replace(each, to=replace(each.to, pattern=patterns[each.name])) for each in chosen),
        importance=tuple(math.fsum(importance for importance, _ in parts[tensor.name]) for tensor in chosen),
        skipped=tuple(skipped),
        identified_by=identified.by,
        seconds=time.perf_counter() - start,
    )


def measure_unit(folder: Path, unit: Unit, choices: range) -> tuple[float, Curve]:
    """Return the importance of a band, and its curve.

    Raises
    ------
    CheckpointError
        For a truncated file, NaN or infinite weights, and an importance beyond float64.
    """
    assert unit.tensor is not None
    m, direction = unit.tensor.pattern.m, unit.tensor.direction
    curves = []
    for piece in pieces_of(unit):
        weights = read_weights(folder, unit, piece)
        check_finite(unit, piece, weights)
        matrices = convolution_matrices(narrow_as_float32(weights))
        try:
            # All of it at n = m.
            curves.append(curve_of(matrices, m, direction, [*choices, m], threads=1))
        except ValueError as error:
            raise CheckpointError(f"tensor {unit.tensor.name!r}: {error}") from None
    values, counts = _sum_of(curves)
    return values[-1], (values[:-1], counts[:-1])


def _sum_of(curves: Sequence[Curve]) -> Curve:
    """Return the curve of what several are the curves of the parts of."""
    values = tuple(map(math.fsum, zip(*(values for values, _ in curves), strict=True)))
    return values, tuple(map(sum, zip(*(counts for _, counts in curves), strict=True)))
