"""The record beside pruned weights: which tensors of a folder were pruned, and to what, for later checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masksolve._inputs import check_direction, check_flag
from masksolve._pattern import Pattern
from masksolve._version import __version__
from masksolve.checkpoint._file import CheckpointError, ChosenTensor, PrunedAs, TensorInfo, parse_json

RECORD = "masksolve.json"


def record_of(chosen: Sequence[ChosenTensor], earlier: Mapping[str, PrunedAs] | None = None) -> str:
    """Return the record as JSON; of tensors that were pruned `earlier`, and not again, it repeats what they were.

    It is the same for the same weights and masks, wherever, whenever and however they are pruned.
    """
    pruned = {**(earlier or {}), **{tensor.name: tensor.to for tensor in chosen}}
    record = {
        "masksolve_version": __version__,
        "tensors": [
            {"name": name, "stack": line.stack, "pattern": str(line.pattern), "direction": line.direction}
            for name, line in pruned.items()
        ],
    }
    return json.dumps(record, indent=2) + "\n"


def read_record(path: Path, tensors: Sequence[TensorInfo]) -> dict[str, PrunedAs]:
    """Return what a record, or the JSON report of a prune, says some tensors were pruned to.

    Raises
    ------
    CheckpointError
        If it is neither, says that nothing was pruned, or names a tensor twice, or one that is not among these.
    """
    try:
        record = parse_json(path.read_bytes(), path)
        lines = [(entry["name"], pruned_as(entry)) for entry in record["tensors"]]
        pruned = dict(lines)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is neither {RECORD} nor the JSON report of a prune ({error!r}); name another file, or remove it"
        ) from None
    names = {tensor.name for tensor in tensors}
    for name in pruned:
        if name not in names:
            raise CheckpointError(
                f"{path} says that the tensor {name!r} was pruned, which the checkpoint does not have; it is of "
                "another checkpoint: name its own, or remove it"
            )
    if len(pruned) < len(lines):
        twice = next(name for name, count in Counter(name for name, _ in lines).items() if count > 1)
        raise CheckpointError(f"{path} names the tensor {twice!r} twice; name another file, or remove it")
    if not pruned:
        raise CheckpointError(f"{path} says that no tensor was pruned; name another file, or remove it")
    return pruned


def pruned_as(entry: Mapping[str, Any]) -> PrunedAs:
    """Return what a line of a record says a tensor was pruned to."""
    check_flag(entry["stack"], "stack")
    return PrunedAs(entry["stack"], Pattern.parse(entry["pattern"]), check_direction(entry["direction"]))
