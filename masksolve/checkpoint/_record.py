"""The record beside pruned weights: which tensors of a folder were pruned, for whoever checks them later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from masksolve._pattern import Pattern
from masksolve._version import __version__
from masksolve.checkpoint._file import CheckpointError, TensorInfo, parse_json
from masksolve.checkpoint._selection import Given

RECORD = "masksolve.json"


def record_of(pattern: Pattern, chosen: Sequence[TensorInfo]) -> str:
    """The record as JSON: the same for the same weights and masks, wherever, whenever and however they are pruned."""
    record = {
        "masksolve_version": __version__,
        "pattern": str(pattern),
        "tensors": [{"name": tensor.name, "stack": tensor.stack} for tensor in chosen],
    }
    return json.dumps(record, indent=2) + "\n"


def read_record(path: Path, tensors: Sequence[TensorInfo]) -> Given:
    """Which of some tensors a record, or the JSON report of a prune, says were pruned.

    Raises
    ------
    CheckpointError
        If it is neither, or names a tensor that is not among these.
    """
    try:
        record = parse_json(path.read_bytes(), path)
        stacks = {entry["name"]: bool(entry["stack"]) for entry in record["tensors"]}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is neither {RECORD} nor the JSON report of a prune ({error!r}); name another file, or remove it"
        ) from None
    names = {tensor.name for tensor in tensors}
    for name in stacks:
        if name not in names:
            raise CheckpointError(
                f"{path} says that the tensor {name!r} was pruned, which the checkpoint does not have; it is of "
                "another checkpoint: name its own, or remove it"
            )
    return Given(stacks, f"left dense, says {path.name}")
