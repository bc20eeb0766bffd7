"""Find the tensors of a checkpoint that were pruned, and to what: by a record, or by what the user says of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from masksolve._inputs import check_direction
from masksolve._patterns import PatternsLike, as_patterns
from masksolve.checkpoint._file import CheckpointError, ChosenTensor
from masksolve.checkpoint._identify import identify
from masksolve.checkpoint._layout import Checkpoint
from masksolve.checkpoint._record import RECORD, read_record
from masksolve.checkpoint._selection import Asked, Given, Globs, SkippedTensor, as_checkpoint_error, select_tensors


@dataclass(frozen=True)
class Pruned:
    """The tensors that were pruned, the others, what says so, and whether that is a record."""

    chosen: Sequence[ChosenTensor]
    skipped: Sequence[SkippedTensor]
    by: str
    recorded: bool


def find_pruned(
    checkpoint: Checkpoint,
    given: str | os.PathLike[str],
    pattern: PatternsLike | None,
    direction: str | None,
    globs: Globs,
    record: str | os.PathLike[str] | None,
) -> Pruned:
    """Find the tensors that were pruned.

    The record beside them says which they are, unless globs choose, or another record is named. Without one, they are
    those that would be pruned to `pattern`. Messages name the checkpoint as it was `given`.

    Raises
    ------
    CheckpointError
        If no tensor fits, a record is corrupt or of another checkpoint, globs contradict a record that is named, or
        neither a record nor a pattern is there.
    TypeError, ValueError
        For an invalid pattern or direction.
    """
    asked = None if pattern is None else as_patterns(pattern)
    asked_direction = None if direction is None else check_direction(direction)
    if record is not None and (globs.stack or globs.convolution or globs.transposed):
        raise CheckpointError("`record` says how tensors are read; leave out `stack`, `convolution` and `transposed`")
    path_of_record = Path(record) if record is not None else _record_beside(checkpoint, globs)
    decided: Asked | Given
    if path_of_record is not None:
        recorded = read_record(path_of_record, checkpoint.tensors)
        if asked is not None:
            with as_checkpoint_error():
                asked.check(dict.fromkeys(recorded), "recorded tensor")
        pruned = {
            name: replace(
                to, pattern=(asked and asked.of(name)) or to.pattern, direction=asked_direction or to.direction
            )
            for name, to in recorded.items()
        }
        decided = Given(pruned, f"left dense, says {path_of_record.name}")
        by = path_of_record.name
    elif asked is None:
        if _record_beside(checkpoint, Globs()) is not None:
            raise CheckpointError(
                f"with `include`, `stack`, `convolution` or `transposed` {RECORD} in {given} is not read; "
                "give `pattern`, or the file as `record`"
            )
        raise CheckpointError(f"no record says to which pattern {given} was pruned; give `pattern`")
    else:
        identified = identify(checkpoint)
        decided = Asked(identified.kinds, asked, asked_direction or "both")
        by = identified.by
    chosen, skipped = select_tensors(checkpoint.tensors, globs, decided)
    return Pruned(chosen, skipped, by, path_of_record is not None)


def _record_beside(checkpoint: Checkpoint, globs: Globs) -> Path | None:
    """Return the record of the prune, unless the user says which tensors to take."""
    if globs.choose or not checkpoint.is_folder:
        return None
    path = checkpoint.folder / RECORD
    return path if path.exists() else None
