"""Prune every weight matrix of a checkpoint, with a proof of optimality for every tile, or put given masks on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash

from masksolve._inputs import check_direction
from masksolve._patterns import Patterns, PatternsLike, as_patterns
from masksolve._tiles import convolution_matrices
from masksolve._version import __version__
from masksolve.checkpoint._file import CheckpointError, ChosenTensor, PrunedAs
from masksolve.checkpoint._identify import identify
from masksolve.checkpoint._layout import Checkpoint, read_checkpoint
from masksolve.checkpoint._masks import MaskFile, hash_of, read_mask_file
from masksolve.checkpoint._record import RECORD, read_record, record_of
from masksolve.checkpoint._report import PrunedTensor, PruneReport, WorstTile
from masksolve.checkpoint._run import OnProgress, Outcome, Request, run
from masksolve.checkpoint._selection import Asked, Given, Globs, SkippedTensor, select_tensors, split_tensors
from masksolve.checkpoint._units import Piece, Unit, read_weights
from masksolve.checkpoint._work import Job, SolveMasks, StoredMasks

_DRAWN_TILES = 8

AnyPath = str | os.PathLike[str]


def prune_checkpoint(
    source: AnyPath,
    target: AnyPath | None,
    pattern: PatternsLike,
    *,
    masks: AnyPath | None = None,
    direction: str = "both",
    method: str = "exact",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    stack: Sequence[str] = (),
    convolution: Sequence[str] = (),
    transposed: Sequence[str] = (),
    overwrite: bool = False,
    resume: bool = False,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> PruneReport:
    """Write a copy of a checkpoint in which every weight matrix is N:M sparse, transposable by default.

    The output has the input's files, headers, metadata and bytes, but for the pruned weights, which are +0.0. In a
    folder, masksolve.json says what each tensor was pruned to, by this and earlier prunes, for `check_checkpoint`. The
    output appears under its name only when it is complete and verified. Weights are held in bands of a few MiB, never
    whole.

    Embeddings, output layers tied to one, routers of mixtures of experts and the like are left dense. The model that a
    config.json beside the weights describes says what a tensor is, if transformers is installed (its own classes,
    without weights; code beside them is never run); otherwise the tensor's name does.

    Parameters
    ----------
    source, target : path
        Two .safetensors files, or two folders: shards with an index, such as `model.safetensors.index.json`, or one
        shard. `target` may be None if `masks` is given.
    pattern : str, (int, int), Pattern or mapping
        N **kept** of every M: "4:8", (4, 8) or `Pattern(4, 8)`; or of the tensors that each glob matches, the first
        that does: {"q_proj": "2:4", "*": "4:8"}.
    masks : path, optional
        A .safetensors file to write with the masks, a bit per weight.
    direction : {"both", "rows", "columns"}
        "both": transposable. "rows": one-sided, N of every M consecutive inputs of an output; "columns": of the outputs
        of an input.
    method : str
        As for `masksolve.solve_matrix`.
    include, exclude : str or sequence of str
        One glob of tensor names, or several; a glob also matches names of which it is a part between dots, as "q_proj"
        is of "layers.0.q_proj.weight". With `include`, those and no others are pruned, whatever they are.
    stack, convolution : str or sequence of str
        Globs of tensors of three or more axes: a stack of matrices (..., rows, columns), each of which is pruned, such
        as that of a layer's experts; the weight of a convolution (out, in, *kernel). Needed for three axes where no
        config says; four or more are a convolution's.
    transposed : str or sequence of str
        Globs of tensors that are stored (in, out), as transformers.Conv1D stores them, not (out, in): of these
        one-sided masks run along the other axis. Needed only where no config says, and not for `direction` "both".
    overwrite : bool
        Replace an output that exists, and discard a run that was not finished.
    resume : bool
        Continue a run that was not finished, if there is one; the result is the same, byte for byte.
    workers : int, concurrent.futures.Executor or None
        A number of processes, one being a thread of this one; None takes as many as are worth starting. Or an executor:
        a pool of threads, of MPI or Ray processes, a Dask cluster (`dask_executor`). Workers read and write the files
        themselves, by the same paths.
    on_progress : callable, optional
        Called with the phase ("reading", "pruning", "verifying"), the bytes of it that are done, and all its bytes.

    Returns
    -------
    PruneReport

    Raises
    ------
    CheckpointError
        For an input that cannot be read or in which nothing can be pruned, a method that does not exist or cannot
        solve the pattern, an output equal to the input, NaN or infinite weights, a run that cannot be resumed because
        something differs, and (AnotherRunError) an output that another run is writing.
    FileExistsError, OSError
        For an output that exists or cannot be written.
    TypeError, ValueError
        For an invalid pattern, direction or number of workers.
    MethodNotInstalledError
        If the method's library is missing.
    WorkerLostError
        For a worker that ended in the middle. After this error, an OSError or a KeyboardInterrupt, a note says
        whether anything is kept that `resume` continues.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = Path(folder.name, "in.safetensors"), Path(folder.name, "out.safetensors")
    >>> save_file({"w": np.arange(64.0).reshape(8, 8), "step": np.array(7)}, source)
    >>> report = prune_checkpoint(source, target, "2:4")
    >>> [tensor.name for tensor in report.tensors], report.optimal, round(report.mean_kept_importance, 3)
    (['w'], True, 0.5)
    >>> folder.cleanup()
    """
    if target is None and masks is None:
        raise CheckpointError("nothing to write: give `target`, `masks`, or both")
    asked = Asked({}, as_patterns(pattern), check_direction(direction))
    checkpoint = read_checkpoint(Path(source).absolute())
    identified = identify(checkpoint)
    globs = Globs(include, exclude, stack, convolution, transposed)
    asked = replace(asked, kinds=identified.kinds)
    chosen, skipped = select_tensors(checkpoint.tensors, globs, asked)
    request = Request(
        checkpoint=_without_record(checkpoint),
        chosen=chosen,
        patterns=asked.patterns,
        direction=asked.direction,
        globs=globs,
        identified_by=identified.by,
        job=Job(checkpoint.folder, SolveMasks(method)),
        output=_absolute(target),
        masks=_absolute(masks),
        record=record_of(chosen, _earlier(checkpoint)),
        overwrite=overwrite,
        resume=resume,
    )
    start = time.perf_counter()
    outcome = run(request, workers, on_progress)
    return _report(request, outcome, skipped, time.perf_counter() - start)


def apply_masks(
    source: AnyPath,
    masks: AnyPath,
    target: AnyPath,
    *,
    other_weights: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    workers: int | Executor | None = 1,
    on_progress: OnProgress | None = None,
) -> PruneReport:
    """Write a copy of a checkpoint under masks that `prune_checkpoint` stored.

    Parameters
    ----------
    source, target, overwrite, resume, workers, on_progress
        As for `prune_checkpoint`.
    masks : path
        The file of masks. It says the pattern and the direction, too.
    other_weights : bool
        Take weights that are not those the masks were made for, as after more training.

    Returns
    -------
    PruneReport
        Its gaps say how far the masks are from the best for these weights.

    Raises
    ------
    CheckpointError
        As for `prune_checkpoint`, and for masks of tensors that the checkpoint does not have, or has with another
        shape or other weights.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> folder = tempfile.TemporaryDirectory()
    >>> source, target = Path(folder.name, "in.safetensors"), Path(folder.name, "out.safetensors")
    >>> save_file({"w": np.arange(64.0).reshape(8, 8), "step": np.array(7)}, source)
    >>> _ = prune_checkpoint(source, None, "2:4", masks=Path(folder.name, "masks.safetensors"))
    >>> apply_masks(source, Path(folder.name, "masks.safetensors"), target).optimal
    True
    >>> folder.cleanup()
    """
    given_path = Path(masks).absolute()
    given = read_mask_file(given_path)
    checkpoint = read_checkpoint(Path(source).absolute())
    chosen, skipped = _masked_tensors(checkpoint, given, given_path)
    directions = {to.direction for to in given.to.values()}
    request = Request(
        checkpoint=_without_record(checkpoint),
        chosen=chosen,
        patterns=_patterns_of(given),
        direction=next(iter(directions)) if len(directions) == 1 else None,
        globs=Globs(),
        identified_by=f"the masks in {given_path.name}",
        job=Job(checkpoint.folder, StoredMasks(given_path, hash_of(given_path))),
        output=_absolute(target),
        masks=None,
        record=record_of(chosen, _earlier(checkpoint)),
        overwrite=overwrite,
        resume=resume,
        places=given.places,
        other_weights=other_weights,
    )

    def check(hashes: dict[str, str]) -> None:
        for name, found in hashes.items():
            if found != given.hashes[name] and not other_weights:
                raise CheckpointError(
                    f"the masks in {masks} were made for other weights of tensor {name!r}; "
                    "pass `other_weights=True` to apply them nevertheless"
                )

    start = time.perf_counter()
    outcome = run(request, workers, on_progress, check)
    return _report(request, outcome, skipped, time.perf_counter() - start)


def _patterns_of(given: MaskFile) -> Patterns:
    """Return the pattern of all masks, or that of each if they are of several."""
    patterns = {name: to.pattern for name, to in given.to.items()}
    return as_patterns(patterns if len(set(patterns.values())) > 1 else next(iter(patterns.values())))


def _masked_tensors(
    checkpoint: Checkpoint, given: MaskFile, path: Path
) -> tuple[list[ChosenTensor], list[SkippedTensor]]:
    by_name = {tensor.name: tensor for tensor in checkpoint.tensors}
    for name, shape in given.shapes.items():
        if name not in by_name:
            raise CheckpointError(f"{path} has a mask of tensor {name!r}, which {checkpoint.path} does not have")
        if by_name[name].shape != shape:
            raise CheckpointError(
                f"{path} has a mask of shape {shape} for tensor {name!r}, whose shape is {by_name[name].shape}"
            )
    chosen, skipped = split_tensors(checkpoint.tensors, Globs(), Given(given.to, "has no mask"))
    if len(chosen) < len(given.shapes):
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in skipped if each.name in given.shapes)
        raise CheckpointError(f"not every mask in {path} can be applied: {reasons}")
    return chosen, skipped


def _without_record(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without the record of an earlier prune, in whose place a new one is written."""
    files = tuple(file for file in checkpoint.files if file.name != RECORD)
    return replace(checkpoint, files=files if checkpoint.is_folder else checkpoint.files)


def _earlier(checkpoint: Checkpoint) -> dict[str, PrunedAs]:
    """Return what earlier prunes have recorded beside the weights."""
    path = checkpoint.folder / RECORD
    return read_record(path, checkpoint.tensors) if checkpoint.is_folder and path.exists() else {}


def _absolute(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path).absolute()


def _report(request: Request, outcome: Outcome, skipped: Sequence[SkippedTensor], seconds: float) -> PruneReport:
    masks, globs = request.job.masks, request.globs
    return PruneReport(
        versions={
            "masksolve": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "safetensors")},
        },
        input=str(request.checkpoint.path),
        input_hash=xxhash.xxh3_128_hexdigest("".join(outcome.fingerprints).encode()),
        output=None if request.output is None else str(request.output),
        masks=None if request.masks is None else str(request.masks),
        applied=str(masks.file) if isinstance(masks, StoredMasks) else None,
        other_weights=request.other_weights,
        pattern=request.patterns.given,
        direction=request.direction,
        method=masks.method if isinstance(masks, SolveMasks) else None,
        include=tuple(globs.include),
        exclude=tuple(globs.exclude),
        stack=tuple(globs.stack),
        convolution=tuple(globs.convolution),
        transposed=tuple(globs.transposed),
        identified_by=request.identified_by,
        tensors=tuple(PrunedTensor.of(tensor, outcome.bands[tensor.name]) for tensor in request.chosen),
        skipped=tuple(skipped),
        worst_tiles=tuple(_worst_tiles(request, outcome)),
        seconds=seconds,
    )


def _worst_tiles(request: Request, outcome: Outcome) -> Iterator[WorstTile]:
    """Yield the worst tiles of all tensors; only their places were noted, so their weights are read again."""
    owners = {tensor.name: file.name for file in request.checkpoint.files for tensor in file.tensors}
    chosen = {tensor.name: tensor for tensor in request.chosen}
    tiles = [(tile, name) for name, band in outcome.bands.items() for tile in band.worst]
    for tile, name in sorted(tiles, key=lambda pair: pair[0].badness, reverse=True)[:_DRAWN_TILES]:
        tensor = chosen[name]
        height = tensor.matrix_shape[0]
        above = int(np.ravel_multi_index(tile.matrix, tensor.shape[:-2])) * height if tensor.stack else 0
        rows = slice(above + tile.row, above + tile.row + len(tile.mask))
        columns = slice(tile.column, tile.column + len(tile.mask[0]))
        whole = Unit(owners[name], tensor.offset, tensor.offset + tensor.nbytes, tensor)
        matrices = convolution_matrices(read_weights(request.checkpoint.folder, whole, Piece(rows, columns)))
        weights = matrices if tensor.stack else matrices[tile.matrix]
        yield WorstTile(name, tile, tuple(tuple(map(float, line)) for line in weights))
