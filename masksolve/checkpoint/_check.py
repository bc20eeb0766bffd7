"""Check that the weight matrices of a checkpoint are N:M sparse."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from masksolve._check import check_mask
from masksolve._errors import InvalidMaskError
from masksolve._pattern import Pattern
from masksolve._tiles import convolution_matrices
from masksolve.checkpoint._file import open_tensor, read_header
from masksolve.checkpoint._selection import SkippedTensor, select_tensors


@dataclass(frozen=True)
class TensorCheck:
    """Whether a tensor is transposable N:M sparse; `problem` names its first bad group, or is None."""

    name: str
    shape: tuple[int, ...]
    problem: str | None


def check_checkpoint(
    path: str | os.PathLike[str], pattern: Pattern, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[TensorCheck], list[SkippedTensor]]:
    """Check every tensor that `prune_checkpoint` would prune: at most N nonzeros in every group of M, both ways.

    Raises
    ------
    CheckpointError
        For a file that cannot be read, or in which no tensor fits the pattern.
    """
    source = Path(path)
    chosen, skipped = select_tensors(read_header(source), pattern, include, exclude)
    checks = []
    for tensor in chosen:
        mask = convolution_matrices(open_tensor(source, tensor) != 0)
        try:
            check_mask(mask, pattern.n, pattern.m)
            problem = None
        except InvalidMaskError as error:
            problem = str(error)
        checks.append(TensorCheck(tensor.name, tensor.shape, problem))
    return checks, skipped
