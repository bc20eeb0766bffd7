"""Report what a prune would do, how long it would take and what it would need, before anything runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masksolve._inputs import check_direction
from masksolve._pattern import Pattern
from masksolve._patterns import PatternsLike, as_patterns
from masksolve._tiles import Direction
from masksolve._words import counted, one_sided
from masksolve.checkpoint._executors import workers_for
from masksolve.checkpoint._file import WEIGHT_DTYPES, CheckpointError, ChosenTensor, TensorInfo
from masksolve.checkpoint._identify import identify
from masksolve.checkpoint._layout import Checkpoint, read_checkpoint
from masksolve.checkpoint._report import as_plain
from masksolve.checkpoint._selection import Asked, Globs, SkippedTensor, select_tensors
from masksolve.checkpoint._units import WEIGHTS_A_PIECE, Piece, Unit, pieces_of, read_weights, units_of
from masksolve.checkpoint._work import Job, SolveMasks, check_finite, fingerprint_unit, mask_of, try_method

_SAMPLES = 16
_SAMPLE_SECONDS = 1.0
_SAMPLE_WEIGHTS = 1 << 17
# The input is read to hash it and to prune it, the output to verify it.
_READINGS = 3
# A piece, its copy as float32, its mask, and what judges them: bytes per weight.
_BYTES_A_WEIGHT = 24


@dataclass(frozen=True, repr=False)
class PatternPlan:
    """A plan for one pattern.

    Attributes
    ----------
    pattern : Pattern or dict of str to Pattern
        For all, or for those that each glob matches.
    direction : {"both", "rows", "columns"}
    chosen : tuple of ChosenTensor
        The tensors that would be pruned.
    skipped : tuple of SkippedTensor
        The others, with the reason.
    nbytes : int
        Bytes that would be written.
    workers : int
        Processes that would work.
    seconds : float
        How long, by the speed on a sample of this checkpoint, without waiting for the disk to write.
    memory : int or None
        Bytes that the processes would hold together at most; None where the system does not say.
    """

    pattern: Pattern | dict[str, Pattern]
    direction: Direction
    chosen: tuple[ChosenTensor, ...]
    skipped: tuple[SkippedTensor, ...]
    nbytes: int
    workers: int
    seconds: float
    memory: int | None

    def __repr__(self) -> str:
        goal = f"{as_patterns(self.pattern)}{one_sided(self.direction)}"
        return (
            f"<PatternPlan of {goal}: {counted(len(self.chosen), 'tensor')}, {len(self.skipped)} skipped, "
            f"about {self.seconds:.1f} s with {counted(self.workers, 'worker')}>"
        )


@dataclass(frozen=True, repr=False)
class CheckpointPlan:
    """The result of `plan_checkpoint`.

    Attributes
    ----------
    tensors : tuple of TensorInfo
        All of the checkpoint.
    plans : tuple of PatternPlan
        One for each pattern that some of them fit.
    misfits : dict of str to str
        The other patterns, "N:M", with the reason.
    identified_by : str
        What distinguishes weights from embeddings and the like: the model's config, or the names of tensors.
    """

    tensors: tuple[TensorInfo, ...]
    plans: tuple[PatternPlan, ...]
    misfits: dict[str, str]
    identified_by: str

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON has it."""
        plain: dict[str, Any] = as_plain(self)
        return plain

    def __repr__(self) -> str:
        fitting = ", ".join(f"{len(plan.chosen)} fit {as_patterns(plan.pattern)}" for plan in self.plans) or "none fits"
        return f"<CheckpointPlan of {counted(len(self.tensors), 'tensor')}: {fitting}>"


def plan_checkpoint(
    source: str | os.PathLike[str],
    patterns: Sequence[PatternsLike],
    *,
    direction: str = "both",
    method: str = "exact",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: Sequence[str] = (),
    convolution: Sequence[str] = (),
    transposed: Sequence[str] = (),
    workers: int | None = None,
) -> CheckpointPlan:
    """Report what `prune_checkpoint` would do. Nothing is written.

    Parameters
    ----------
    source : path
        A `.safetensors` file, or a folder of them with an index.
    patterns : sequence of (str, (int, int) or Pattern)
        Each N **kept** of every M: "4:8", (4, 8) or `Pattern(4, 8)`.
    direction, method, include, exclude, stack, convolution, transposed
        As for `prune_checkpoint`.
    workers : int, optional
        For how many processes times and memory are estimated; None as for `prune_checkpoint`.

    Returns
    -------
    CheckpointPlan
        For each pattern the tensors that fit it, seconds, and bytes of memory and of output.

    Raises
    ------
    CheckpointError
        For an input that cannot be read, a method that does not exist or cannot solve a pattern, and NaN or infinite
        weights in the sample.
    TypeError, ValueError
        For invalid patterns, direction or number of workers.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source = Path(folder.name, "in.safetensors")
    >>> save_file({"w": np.arange(64.0).reshape(8, 8), "step": np.array(7)}, source)
    >>> plan = plan_checkpoint(source, ["2:4", "16:32"]).plans[0]
    >>> [tensor.name for tensor in plan.chosen], [tensor.reason for tensor in plan.skipped]
    (['w'], ['dtype I64 is not one of F64, F32, F16, BF16'])
    >>> folder.cleanup()
    """
    if (
        not isinstance(patterns, Sequence)
        or isinstance(patterns, str)
        or any(isinstance(each, int) for each in patterns)
    ):
        raise TypeError(f"patterns must be a sequence of patterns, got {patterns!r}; put it in a list")
    all_patterns, checked_direction = [as_patterns(each) for each in patterns], check_direction(direction)
    checkpoint = read_checkpoint(Path(source).absolute())
    before = _memory()
    identified = identify(checkpoint)
    after = _memory()
    # Only this process asks a model what a tensor is, workers do not.
    of_model = 0 if before is None or after is None else after - before
    globs = Globs(include, exclude, stack, convolution, transposed)
    # Once for all patterns: a glob that matches nothing is not the fault of one of them.
    globs.check(checkpoint.tensors)
    plans, misfits = [], {}
    for pattern in all_patterns:
        try:
            asked = Asked(identified.kinds, pattern, checked_direction)
            chosen, skipped = select_tensors(checkpoint.tensors, globs, asked)
        except CheckpointError as error:
            misfits[str(pattern)] = str(error)
            continue
        units = units_of(checkpoint, chosen)
        nbytes = sum(unit.nbytes for unit in units)
        processes = workers_for(workers, nbytes)
        seconds = _seconds_of_all(checkpoint, chosen, units, Job(checkpoint.folder, SolveMasks(method)))
        memory = _memory()
        if memory is not None:
            memory = of_model + processes * (memory - of_model + WEIGHTS_A_PIECE * _BYTES_A_WEIGHT)
        plans.append(
            PatternPlan(
                pattern=pattern.given,
                direction=checked_direction,
                chosen=tuple(chosen),
                skipped=tuple(skipped),
                nbytes=nbytes,
                workers=processes,
                seconds=seconds / processes,
                memory=memory,
            )
        )
    return CheckpointPlan(tuple(checkpoint.tensors), tuple(plans), misfits, identified.by)


def _seconds_of_all(checkpoint: Checkpoint, chosen: Sequence[ChosenTensor], units: Sequence[Unit], job: Job) -> float:
    """Return the time that one worker would take, estimated from a sample of a few bands."""
    try_method(job, chosen)
    bands = [unit for unit in units if unit.tensor is not None]
    largest = max(units, key=lambda unit: unit.nbytes)
    start = time.perf_counter()
    fingerprint_unit(job, largest)
    reading = (time.perf_counter() - start) / largest.nbytes
    nbytes, solving = 0, 0.0
    for index in range(_SAMPLES):
        unit = bands[index * len(bands) // _SAMPLES]
        piece = _sample_of(unit)
        weights = read_weights(checkpoint.folder, unit, piece)
        check_finite(unit, piece, weights)
        start = time.perf_counter()
        mask_of(job, unit, piece, weights)
        if index > 0:  # the first loads code
            solving += time.perf_counter() - start
            nbytes += weights.nbytes
        if solving > _SAMPLE_SECONDS:
            break
    to_solve = sum(unit.nbytes for unit in bands)
    everything = sum(unit.nbytes for unit in units)
    return solving / nbytes * to_solve + reading * _READINGS * everything


def _sample_of(unit: Unit) -> Piece:
    """Return the first tile rows of a band, or as much of the first as is enough."""
    assert unit.tensor is not None
    m = unit.tensor.pattern.m
    first = next(pieces_of(unit))
    row = unit.nbytes // (unit.rows.stop - unit.rows.start)
    itemsize = WEIGHT_DTYPES[unit.tensor.dtype].itemsize
    rows = max(1, _SAMPLE_WEIGHTS * itemsize // (row * m)) * m
    return Piece(slice(first.rows.start, min(first.rows.stop, first.rows.start + rows)), first.columns)


def _memory() -> int | None:
    """Return the most that this process has held in memory, in bytes; it has just worked like a worker."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
